"""The examples of docs/extending.md are parts that work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributions import install
from tests.documented import DOCS, examples
from token_swarm import DecodeRequest, LocalEnsemble, Mixture, Rule
from token_swarm.particle import Particle
from token_swarm.search.utilities import utility_kind

ROOT = DOCS.parent


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three documented modules, installed."""
    entries = {
        "backends": "bytes = experts:BytesExpert",
        "utilities": "brevity = utilities:KIND",
        "rules": "root = rules:ROOT",
    }
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    for source, (group, entry) in zip(examples("extending.md"), entries.items(), strict=True):
        name, target = entry.split(" = ")
        assert f'[project.entry-points."token_swarm.{group}"]\n{name} = "my_package.{target}"' in page
        module = f"documented_{group}"
        target = f"{module}:{target.partition(':')[2]}"
        install(tmp_path / group, monkeypatch, module, source, {f"token_swarm.{group}": {name: target}})
    monkeypatch.setattr(Rule, "_made", dict(Rule._made))


@pytest.mark.usefixtures("parts")
def test_the_documented_parts_work() -> None:
    local = LocalEnsemble.load({"a": "x", "b": "y"}, backend="bytes", engine={"seed": 3}, max_context=50)
    particle = Particle("p", Mixture({"a": 1.0, "b": 3.0}, Rule("root")))
    text, _ = local.generate("ab", particle, DecodeRequest(max_bytes=8))
    assert text
    kind = utility_kind("brevity")
    assert kind.percent
    assert kind.schema.__name__ == "PromptExample"


@pytest.mark.parametrize("page", ["docs/extending.md", "docs/python.md", "CONTRIBUTING.md"])
def test_the_files_that_it_names_are_there(page: str) -> None:
    bases = [ROOT, *(ROOT / base for base in ("token_swarm", "token_swarm/experts", "token_swarm/kernels"))]
    bases += [ROOT / "server/token_swarm_server", ROOT / "protos/token_swarm/v1"]
    named = re.findall(r"`([\w./]+(?:\.py|\.cpp|\.proto|/))`", (ROOT / page).read_text(encoding="utf-8"))
    assert named or page == "docs/python.md"
    missing = [name for name in named if not any((base / name).exists() for base in bases)]
    assert missing == []
