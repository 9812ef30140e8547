"""The laws of the Triton kernels under Triton's interpreter, in a process where it is on from the start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="the GPU kernels need the extra `triton`")

HERE = Path(__file__).parent
LAWS = [
    node.name
    for file in sorted(HERE.glob("triton_*laws.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Law -> case -> "" or what went wrong."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, str(HERE / "triton_interpreted.py")],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        found[name.split("[")[0]][name] = "".join(f"{problem.tag}: {problem.text}" for problem in case)
    return found


@pytest.mark.parametrize("law", LAWS)
def test_interpreted(verdicts: dict[str, dict[str, str]], law: str) -> None:
    assert verdicts[law], "no case ran"
    wrong = {name: problem for name, problem in verdicts[law].items() if problem}
    assert not wrong, "\n".join(f"{name}\n{problem}" for name, problem in wrong.items())
