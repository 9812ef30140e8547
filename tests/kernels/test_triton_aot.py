"""The Triton kernels compiled ahead of time for two architectures, without a GPU: what their machine code needs.

`python -m bench.triton_aot` prints the table.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

tl = pytest.importorskip("triton.language", reason="the GPU kernels need the extra `triton`")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "token_swarm" / "kernels" / "triton"

# An SM has 65,536 registers: at half of them per program two programs run at once, and one computes while the other
# waits for memory.
REGISTERS_PER_PROGRAM = 32_768
# One program a row: there are fewer rows than SMs, and nothing to share one with. ptxas' own limit.
ALONE = {"find_threshold": 255 * 256}

# 128-bit loads that a kernel of 3 experts has at least, and why some have none. Logits are bfloat16: 2,048 tokens for
# 256 threads are one wide load per expert; probabilities are float32: two.
WIDE_LOADS = {
    "softmax_partials": 3,
    "linear_write": 3,
    "joint_write": 3,
    "scale_write": 2,
    "tile_statistics": 2,
    "census": 2,
    "collect": 2,
    "find_threshold": 2,  # the slow path's stream
    "shape_write": 2,
    "pick": 2,
    "gather_ordered": 4,  # the order, int64; the probabilities are gathered
    "prefix_write": 2,
    "linear_scores": 3,
}
NARROW = {
    "softmax_combine": "reads one number a tile",
    "joint_combine": "reads one number a tile",
    "item_scores": "reads one row of particles a chunk",
    "union_write": "gathers logits at the union's ids; a segment, and with it a tile, begins anywhere",
    "union_scale": "a segment, and with it a tile, begins anywhere",
}
# A byte law has 257 symbols, an odd number: its rows are aligned to 4 bytes. A law over a vocabulary is read wide.
LAWS_LOADS = {"257": 0, "151936": 6}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every kernel for every architecture, compiled in a process of its own, where the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.triton_aot", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


def kernels() -> set[str]:
    """Device functions that ask which program they are: those that are launched."""
    names = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                asks = any(isinstance(n, ast.Attribute) and n.attr == "program_id" for n in ast.walk(node))
                names |= {node.name} if asks else set()
    return names


def test_no_global_of_a_kernel_is_nan():
    """Before every call Triton compares a kernel's globals with those it was compiled with: NaN, which equals nothing,
    makes the second call fail. Only on a GPU: neither the interpreter nor compiling ahead of time compares."""
    for path in PACKAGE.glob("*.py"):
        values = vars(importlib.import_module(f"token_swarm.kernels.triton.{path.stem}"))
        constants = {name: value.value for name, value in values.items() if isinstance(value, tl.constexpr)}
        assert {name for name, value in constants.items() if value != value} == set()


def test_every_kernel_is_compiled_for_both_architectures(compiled):
    assert len(kernels()) == 19
    for arch in (80, 90):
        assert {one["kernel"] for one in compiled if one["arch"] == arch} == kernels()


def test_nothing_spills(compiled):
    assert {one["kernel"]: one["spills"] for one in compiled if one["spills"]} == {}


def test_registers_leave_room_for_a_second_program(compiled):
    for one in compiled:
        used = one["registers"] * one["threads"]
        assert 0 < used <= ALONE.get(one["kernel"], REGISTERS_PER_PROGRAM), one


def test_streams_are_read_128_bits_at_a_time(compiled):
    assert {*WIDE_LOADS, *NARROW, "log_linear_scores"} == kernels()
    for one in compiled:
        if one["kernel"] == "log_linear_scores":
            symbols = next(symbols for symbols in LAWS_LOADS if symbols in one["case"])
            assert one["loads_128"] >= LAWS_LOADS[symbols], one
        elif one["kernel"] in WIDE_LOADS:
            assert one["loads_128"] >= WIDE_LOADS[one["kernel"]], one
        else:
            assert one["loads_128"] == 0, f"{one}: {NARROW[one['kernel']]} is no longer true"


def test_results_are_written_128_bits_at_a_time(compiled):
    for one in compiled:
        if one["kernel"] in {"linear_write", "joint_write", "scale_write", "shape_write", "gather_ordered"}:
            assert one["stores_128"] >= 2, one
