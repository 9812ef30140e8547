"""What is shipped: the parts of the kernels, and what the packages say about themselves."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools

from token_swarm.kernels import native

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "token_swarm/kernels/csrc"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names of setup.py, and what it calls `setup` with."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py")), given


def test_every_source_is_compiled_for_every_instruction_set_or_once(setup) -> None:
    names, given = setup
    (extension,) = given["ext_modules"]
    work = list(names["units"](extension.sources))
    assert {Path(unit.source).name for unit in work} == {path.name for path in CSRC.glob("*.cpp")}
    for path in CSRC.glob("*.cpp"):
        levels = [unit.level for unit in work if Path(unit.source).name == path.name]
        # A source of kernels puts them into the namespace of its level.
        versions = 3 if "namespace TS_NAMESPACE" in path.read_text() else 1
        assert levels == list(range(versions)), path.name
    assert len({unit.title for unit in work}) == len(work)
    assert set(names["SLOWEST"]) <= {path.stem for path in CSRC.glob("*.cpp")}
    assert list(native.LEVELS.values()) == list(names["LEVELS"])


def test_a_change_of_any_part_compiles_the_kernels_again(setup) -> None:
    _, given = setup
    (extension,) = given["ext_modules"]
    assert {*extension.sources, *extension.depends} == {str(path.relative_to(ROOT)) for path in CSRC.iterdir()}
    assert extension.optional
    assert "graft token_swarm/kernels/csrc" in (ROOT / "MANIFEST.in").read_text()


def test_what_is_exported_is_what_is_called() -> None:
    exported = set()
    for path in CSRC.glob("*.cpp"):
        exported |= set(re.findall(r"^TS_API [^(]*?(ts_\w+)\(", path.read_text(), re.MULTILINE))
    called = set()
    for name in ("native.py", "byte_walk.py"):
        called |= set(re.findall(r"\bts_\w+", (ROOT / "token_swarm/kernels" / name).read_text()))
    assert exported == called


@pytest.mark.parametrize("folder", [ROOT, ROOT / "clients/python"])
def test_the_metadata_is_complete_and_true(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["authors"] == [{"name": "Token Swarm developers"}]
    assert {"description", "readme", "keywords", "classifiers", "license", "requires-python"} <= project.keys()
    assert len(project["description"]) < 140
    assert (folder / project["readme"]).exists()
    assert all((folder / name).exists() for name in project["license-files"])
    assert "urls" not in project  # there is no public home
    minors = [
        line.rpartition(".")[2]
        for line in project["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert minors[0] == project["requires-python"].rpartition(".")[2]
