"""Every Triton kernel compiled ahead of time, without a GPU: `python -m bench.triton_aot`.

The kernels are called as a program calls them, on CPU tensors of real sizes, with the launch itself replaced: what
would have been launched is compiled for each architecture with the specialisation Triton's JIT would choose (which
pointers and sizes are divisible by 16 is read off the arguments). Registers, spills and 128-bit loads are those of the
machine code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from token_swarm.kernels import triton as kernels
from token_swarm.kernels.triton import launch
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule
from token_swarm.vocabulary import Vocabulary

ARCHITECTURES = (80, 90)
WIDTH = 151_936
EXPERTS = 3
TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Launch:
    """One kernel as it was about to be launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel for one architecture needs."""

    case: str
    kernel: str
    arch: int
    registers: int
    spills: int
    loads_128: int
    stores_128: int
    loads: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    launches: list[Launch] = []
    original = launch.launch

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, {**constants, **launch.OPTIONS}))

    launch.launch = record
    try:
        yield launches
    finally:
        launch.launch = original


def small_union() -> UnionMap:
    """Three vocabularies that share some tokens, and each two ids for the same bytes."""
    tables = [
        Vocabulary((None, *(b"%d" % token for token in range(low, low + 4000)), b"3999"), (0,))
        for low in (0, 1000, 3000)
    ]
    return UnionMap.build(tables)


def calls() -> dict[str, Callable[[], object]]:
    """Every public function in its variants, on arguments of real sizes and types."""
    rows = 2
    weights = torch.full((rows, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    allowed = torch.ones(WIDTH, dtype=torch.bool)
    plain = torch.ones(rows, dtype=torch.float64)
    found: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = [torch.empty(rows, WIDTH, dtype=dtype) for _ in range(EXPERTS)]
        for rule in Rule:
            name = f"{rule.value} {str(dtype).removeprefix('torch.')}"
            found[f"mix {name}"] = lambda logits=logits, rule=rule: kernels.mix(logits, weights, weights, rule, allowed)
    probabilities = torch.empty(rows, WIDTH)
    found["shape"] = lambda: kernels.shape(probabilities, plain, plain.int(), plain, plain)
    found["choose"] = lambda: kernels.choose(probabilities, plain, plain.bool())
    found["prefix_mass"] = lambda: kernels.prefix_mass(probabilities, torch.arange(WIDTH))
    union = small_union()
    for dtype in (torch.bfloat16, torch.float32):
        own = [torch.empty(rows, 4096, dtype=dtype) for _ in range(EXPERTS)]
        for rule in Rule:
            name = f"{rule.value} {str(dtype).removeprefix('torch.')}"
            found[f"union {name}"] = lambda own=own, rule=rule: kernels.mix_union(
                own, weights, weights, rule, union, -30.0
            )
    particles = torch.empty(64, EXPERTS, dtype=torch.float64)
    offsets = torch.tensor([0, 4096])
    for dtype in (torch.float32, torch.float64):
        masses = torch.empty(EXPERTS, 4096, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"score linear {name}"] = lambda masses=masses: kernels.score_linear(masses, particles, offsets)
    for dtype, symbols in ((torch.float32, 257), (torch.float32, 151_936), (torch.bfloat16, 151_936)):
        laws = torch.empty(1, dtype=dtype).expand(4096, EXPERTS, symbols)
        laws = torch.empty(16, EXPERTS, symbols, dtype=dtype)
        name = f"{symbols} {str(dtype).removeprefix('torch.')}"
        found[f"score log-linear {name}"] = lambda laws=laws: kernels.score_log_linear(
            laws, torch.zeros(16, dtype=torch.int64), particles, torch.tensor([0, 16])
        )
    return found


def compile_launch(case: str, one: Launch, arch: int) -> Compiled:
    """Compile `one` for `arch` as the JIT would, and take its machine code apart."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(one.kernel.signature, one.kernel.params, backend)
    bound, specialization, keywords = binder(*one.arguments, **one.constants)
    options, signature, constants, attributes = one.kernel._pack_args(backend, keywords, bound, specialization, None)
    source = ASTSource(one.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        machine_code = _tool("nvdisasm", "--print-code", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump does not say what {one.kernel.__name__} uses:\n{usage}")
    spills = len(re.findall(r"\b(?:LDL|STL)\b", machine_code)) + int(stack[1])
    return Compiled(
        case=case,
        kernel=one.kernel.__name__,
        arch=arch,
        registers=int(registers[1]),
        spills=spills,
        loads_128=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", machine_code)),
        stores_128=len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", machine_code)),
        loads=len(re.findall(r"\bLDG\.E", machine_code)),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, only: str = "") -> list[Compiled]:
    """Every distinct launch of every call, for every architecture. `only` keeps the calls whose name holds it."""
    results: list[Compiled] = []
    seen: set[tuple[object, ...]] = set()
    for case, call in calls().items():
        if only not in case:
            continue
        with recorded() as launches:
            call()
        for one in launches:
            shown = tuple(
                (str(a.dtype), a.data_ptr() % 16) if isinstance(a, torch.Tensor)
                else tuple(str(t.dtype) if isinstance(t, torch.Tensor) else t % 16 for t in a) if isinstance(a, tuple)
                else (a == 1, a % 16) if isinstance(a, int) else a
                for a in one.arguments
            )  # fmt: skip
            key = (one.kernel.__name__, shown, tuple(sorted(one.constants.items())))
            if key not in seen:
                seen.add(key)
                results += [compile_launch(case, one, arch) for arch in architectures]
    return results


def table(results: list[Compiled]) -> str:
    """The results as a table, one line per kernel and architecture."""
    head = ("case", "kernel", "arch", "registers", "spills", "LDG.128", "of loads", "STG.128")
    lines = [head] + [
        (r.case, r.kernel, f"sm_{r.arch}", *map(str, (r.registers, r.spills, r.loads_128, r.loads, r.stores_128)))
        for r in results
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="keep the calls whose name holds this text")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    arguments = parser.parse_args()
    results = compile_all(only=arguments.only)
    sys.stdout.write((json.dumps([asdict(r) for r in results]) if arguments.json else table(results)) + "\n")


if __name__ == "__main__":
    main()
