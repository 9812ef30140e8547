"""The documented searches from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import save_small_llama
from tests.documented import examples
from token_swarm.particle import Particle


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two small experts and data where the examples look for them."""
    for name, vocabulary in (("smollm2", 270), ("qwen2.5-coder", 280)):
        (tmp_path / ".cache" / "experts").mkdir(parents=True, exist_ok=True)
        save_small_llama(tmp_path / ".cache" / "experts" / name, vocabulary)
    (tmp_path / ".cache" / "data").mkdir()
    lines = [json.dumps({"prompt": "so ", "text": f"the cat sat on mat {i}"}) + "\n" for i in range(12)]
    (tmp_path / ".cache" / "data" / "code.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_search_from_python(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search, utility = examples("search.md")
    exec(compile(search, "docs/search.md", "exec"), {})
    particle = Particle.load(checkout / "runs" / "code" / "particle.json")
    assert particle.name == "code"
    assert str(particle.test_score) in capsys.readouterr().out
    exec(compile(utility, "docs/search.md", "exec"), {})
    assert float(capsys.readouterr().out.strip(" []\n")) > 0
