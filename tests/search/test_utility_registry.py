"""Utilities of other distributions: one module and one entry point each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from token_swarm_server.cli import app
from typer.testing import CliRunner

from tests.conftest import save_small_llama
from tests.distributions import install
from token_swarm.errors import PluginError, UnknownName
from token_swarm.search.utilities import UTILITIES, Goal, utility_kind

SOURCE = '''
from token_swarm.search.data import PromptExample
from token_swarm.search.utilities import GeneratedUtility, WrittenKind


class Vowels(GeneratedUtility):
    def judge(self, example, text):
        return sum(text.count(each) for each in "aeiou") / max(1, len(text))


KIND = WrittenKind(PromptExample, lambda examples, texts, judging: Vowels("vowels", examples, texts), percent=True)
NO_KIND = Vowels
'''


@pytest.fixture
def vowels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {"vowels": "vowel_count:KIND", "class": "vowel_count:NO_KIND", "gone": "vowel_count:GONE"}
    install(tmp_path / "site", monkeypatch, "vowel_count", SOURCE, {"token_swarm.utilities": objects})


@pytest.mark.usefixtures("vowels")
def test_a_broken_one_is_named_with_what_is_missing() -> None:
    assert UTILITIES.names()[-3:] == ("class", "gone", "vowels")
    with pytest.raises(PluginError, match=r"class = vowel_count:NO_KIND of token_swarm.utilities: a utility is a"):
        utility_kind("class")
    with pytest.raises(PluginError, match=r"gone = vowel_count:GONE of .*cannot be imported: .*'GONE'"):
        utility_kind("gone")
    with pytest.raises(UnknownName, match="no utility named 'perplexity'"):
        Goal.load("perplexity", Path("none.jsonl"))


@pytest.mark.usefixtures("vowels")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_search_maximises_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    # Other processes find the distribution by the path of this one.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    for name, vocabulary in (("small", 270), ("large", 280)):
        save_small_llama(tmp_path / name, vocabulary)
    experts = "".join(f"  {name}: {{model: {tmp_path / name}, threads: 1}}\n" for name in ("small", "large"))
    (tmp_path / "config.yaml").write_text(f"experts:\n{experts}cache: {tmp_path / 'cache'}\n")
    prompts = [json.dumps({"prompt": f"the {word}"}) + "\n" for word in ("cat", "rat", "mat", "hat")]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    arguments = ["search", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--json"]
    arguments += ["--utility", "vowels", "--data", str(tmp_path / "prompts.jsonl"), "--no-report", "--test", "0"]
    arguments += ["--optimiser", "random", "--swarm-size", "3", "--iterations", "1", "--max-bytes", "8"]
    arguments += ["--keep-undecided"]  # what is learned here does not matter
    result = CliRunner().invoke(app, [*arguments, "--workers", workers])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["particle"]["utility"] == "vowels"
