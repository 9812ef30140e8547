"""The cap on the kernels' instructions, and a core of tests as other processors run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.processors import PROCESSORS, Processor, levels_here
from token_swarm.kernels import native

ROOT = Path(__file__).parents[2]
CORE = ("tests/kernels/test_linear.py", "tests/unit/test_cpu_norm.py", "tests/unit/test_cpu_linear.py")
"""What depends on the processor most: sums of the layers of experts."""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own: the kernels and torch read these variables once."""
    environment = {**os.environ, native.CAP_VARIABLE: "", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def printed_level(**variables: str) -> subprocess.CompletedProcess[str]:
    return run("-c", "from token_swarm.kernels import native; print(native.instruction_set())", **variables)


@pytest.mark.parametrize("name", native.LEVELS)
def test_a_cap_holds_the_kernels_down_to_its_level(name: str) -> None:
    done = printed_level(**{native.CAP_VARIABLE: name})
    if name in levels_here():
        assert done.stdout.strip() == native.LEVELS[name], done.stderr
    else:
        assert f"BadParameter: {native.CAP_VARIABLE}: {name!r} is not allowed" in done.stderr


def test_a_cap_of_another_name_is_refused() -> None:
    done = printed_level(**{native.CAP_VARIABLE: "sse4"})
    assert done.returncode == 1
    allowed = ", ".join(levels_here())
    assert f"{native.CAP_VARIABLE}: 'sse4' is not allowed; it must be one of {allowed} on this" in done.stderr


def test_a_caller_does_not_rise_above_the_cap() -> None:
    script = "from token_swarm.kernels import native; print(native.instruction_set('AVX-512'))"
    assert run("-c", script, **{native.CAP_VARIABLE: "baseline"}).stdout.strip() == "baseline"


def test_doctor_shows_the_level_and_the_cap() -> None:
    done = run("-m", "token_swarm_server.cli", "doctor", "--json", **{native.CAP_VARIABLE: "baseline"})
    assert "C++ (baseline, held down by TOKEN_SWARM_CPU_LEVEL=baseline)" in done.stdout


def test_the_command_line_reports_a_wrong_cap_in_one_line() -> None:
    done = run("-m", "token_swarm_server.cli", "doctor", **{native.CAP_VARIABLE: "sse4"})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {native.CAP_VARIABLE}: 'sse4' is not allowed")
    assert done.stderr.count("\n") == 1


# The others are like this one, or run by `make test-processors`.
OTHERS = [each for each in PROCESSORS[:2] if each.is_possible]


@pytest.mark.parametrize("processor", OTHERS, ids=lambda each: each.name)
def test_the_core_of_tests_passes_as_another_processor_runs_it(processor: Processor) -> None:
    done = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *CORE, **processor.variables)
    assert done.returncode == 0, done.stdout[-4000:]
