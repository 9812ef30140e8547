"""Other processors, simulated: what environment makes this one behave as they would. `make test-processors` runs it.

The kernels, torch's own operators, oneDNN and MKL choose their instructions each for itself: a cap on one leaves the
others as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import torch

from token_swarm.kernels import native

TESTS = (
    "tests/kernels",
    "tests/unit/test_cpu_linear.py",
    "tests/unit/test_cpu_norm.py",
    "tests/unit/test_transformers_expert.py",
    "tests/laws/test_expert_laws.py",
    "tests/integration/test_transformers_expert.py",
)
"""What may depend on the processor."""


@dataclass(frozen=True)
class Processor:
    """A processor that this one can be, if it has `needs`, one of torch's names of capabilities."""

    name: str
    needs: str | None
    variables: dict[str, str]

    @property
    def is_possible(self) -> bool:
        """Whether this processor has what that one has."""
        return self.needs is None or bool(torch.cpu.get_capabilities().get(self.needs, False))


_AVX512 = {native.CAP_VARIABLE: "avx512", "ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
PROCESSORS = (
    Processor(
        "AVX2",
        "avx2",
        {
            native.CAP_VARIABLE: "avx2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
        },
    ),
    Processor("AVX-512 without bfloat16", "avx512_f", _AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    Processor("AVX-512 with bfloat16", "avx512_bf16", _AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    Processor("AMX", "amx_bf16", _AVX512 | {"ONEDNN_MAX_CPU_ISA": "ALL"}),
)


def levels_here() -> list[str]:
    """The values of CAP_VARIABLE that this processor takes."""
    script = "from token_swarm.kernels import native; print(native.require().ts_level())"
    environment = {**os.environ, native.CAP_VARIABLE: ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return list(native.LEVELS)[: int(done.stdout) + 1]


def main() -> int:
    """Run TESTS as every possible processor; the number of them on which some failed."""
    failed = 0
    for processor in PROCESSORS:
        if not processor.is_possible:
            print(f"{processor.name}: this processor has no {processor.needs}", flush=True)
            continue
        shown = " ".join(f"{name}={value}" for name, value in processor.variables.items())
        print(f"{processor.name}: {shown}", flush=True)
        # Without the tests that simulate processors themselves.
        alone = "--ignore=tests/kernels/test_processors.py"
        command = [sys.executable, "-m", "pytest", "-q", alone, *TESTS, *sys.argv[1:]]
        failed += subprocess.run(command, env={**os.environ, **processor.variables}).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
