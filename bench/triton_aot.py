"""Every Triton kernel compiled ahead of time, without a GPU: `python -m bench.triton_aot`.

The kernels are called as a program calls them, on CPU tensors of real sizes, with the launch itself replaced: what
would have been launched is compiled for each architecture with the specialisation Triton's JIT would choose (which
pointers and sizes are divisible by 16 is read off the arguments). Registers, spills and 128-bit loads are those of the
machine code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
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

from bench.common import print_facts, print_json
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
    threads: int
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


def small_union(experts: int) -> UnionMap:
    """Vocabularies that share some tokens."""
    tables = [
        Vocabulary((None, *(b"%d" % token for token in range(low, low + 4000)), b"3999"), (0,))
        for low in range(0, 1000 * experts, 1000)
    ]
    return UnionMap.build(tables)


def calls(experts: int, every_type: bool) -> dict[str, Callable[[], object]]:
    """The public functions on arguments of real sizes; `every_type` adds the other types of logits and caches."""
    rows = 2
    weights = torch.full((rows, experts), 1 / experts, dtype=torch.float64)
    allowed = torch.ones(WIDTH, dtype=torch.bool)
    plain = torch.ones(rows, dtype=torch.float64)
    union = small_union(experts)
    probabilities = torch.empty(rows, WIDTH)
    found: dict[str, Callable[[], object]] = {
        "shape": lambda: kernels.shape(probabilities, plain, plain.int(), plain, plain),
        "choose": lambda: kernels.choose(probabilities, plain, plain.bool()),
        "prefix_mass": lambda: kernels.prefix_mass(probabilities, torch.arange(WIDTH)),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if every_type else (torch.bfloat16,):
        logits = [torch.empty(rows, WIDTH, dtype=dtype) for _ in range(experts)]
        for rule in Rule:
            name = f"{rule.value}, {str(dtype).removeprefix('torch.')}"
            mixing = (logits, weights, weights, rule)
            found[f"mix {name}"] = lambda mixing=mixing: kernels.mix(*mixing, allowed)
            sampling = (*mixing, allowed, plain, plain.int(), plain, plain, plain)
            found[f"sample {name}"] = lambda sampling=sampling: kernels.sample(*sampling)
            found[f"union {name}"] = lambda mixing=mixing: kernels.mix_union(*mixing, union, -30.0)
    particles = torch.empty(64, experts, dtype=torch.float64)
    targets, offsets = torch.zeros(16, dtype=torch.int64), torch.tensor([0, 16])
    for dtype in (torch.float32, torch.float64) if every_type else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        masses = torch.empty(experts, 4096, dtype=dtype)
        found[f"score linear, {name}"] = lambda masses=masses: kernels.score_linear(masses, particles, offsets)
        for symbols in (257, WIDTH):
            laws = torch.empty(16, experts, symbols, dtype=dtype)
            found[f"score log-linear, {symbols} {name}"] = lambda laws=laws: kernels.score_log_linear(
                laws, targets, particles, offsets
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
        threads=32 * binary.metadata.num_warps,
        registers=int(registers[1]),
        spills=spills,
        loads_128=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", machine_code)),
        stores_128=len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", machine_code)),
        loads=len(re.findall(r"\bLDG\.E", machine_code)),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


def compile_all(
    architectures: Sequence[int] = ARCHITECTURES, *, experts: int = EXPERTS, every_type: bool = False, only: str = ""
) -> list[Compiled]:
    """Every kernel, once for each set of pointer types and tile sizes. `only` keeps the calls whose name holds it."""
    results: list[Compiled] = []
    seen: set[tuple[object, ...]] = set()
    for case, call in calls(experts, every_type).items():
        if only not in case:
            continue
        with recorded() as launches:
            call()
        for one in launches:
            tensors = [t for a in one.arguments for t in (a if isinstance(a, tuple) else (a,)) if hasattr(t, "dtype")]
            sizes = {name: one.constants.get(name) for name in ("tile", "block", "linear", "capacity")}
            left_out = sum(argument is None for argument in one.arguments)
            key = (one.kernel.__name__, frozenset(str(tensor.dtype) for tensor in tensors), left_out, *sizes.items())
            if key not in seen:
                seen.add(key)
                results += [compile_launch(case, one, arch) for arch in architectures]
    return results


def table(results: list[Compiled]) -> str:
    """The results as a table, one line per kernel and architecture."""
    head = ("case", "kernel", "arch", "threads", "registers", "spills", "LDG.128", "of loads", "STG.128")
    lines = [head] + [
        (
            r.case,
            r.kernel,
            f"sm_{r.arch}",
            *map(str, (r.threads, r.registers, r.spills, r.loads_128, r.loads, r.stores_128)),
        )
        for r in results
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="keep the calls whose name holds this text")
    parser.add_argument("--experts", type=int, default=EXPERTS, help="experts that are mixed (default: %(default)s)")
    parser.add_argument("--every-type", action="store_true", help="also float16 and float32 logits, float64 caches")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = compile_all(experts=arguments.experts, every_type=arguments.every_type, only=arguments.only)
    if arguments.json:
        print_json("triton_aot", {"rows": [asdict(r) for r in results]})
        return
    print_facts()
    print(table(results))


if __name__ == "__main__":
    main()
