"""Backends of other distributions: found by name, loaded with what a configuration says, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from token_swarm_server.cli import app
from token_swarm_server.config.loading import ConfigError, load_settings
from token_swarm_server.expert_server.process import ExpertStartError, run_expert
from typer.testing import CliRunner

from tests.distributions import install
from token_swarm.errors import PluginError, UnknownName
from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.registry import BACKENDS, load_expert

SOURCE = """
from token_swarm.experts.toy import ToyExpert
from token_swarm.vocabulary import Vocabulary

BYTES = Vocabulary((*(bytes([each]) for each in range(256)), None), eos_ids=(256,))
LOADED = []


class Letters(ToyExpert):
    def __init__(self, name, model, *, device, dtype, threads, max_sequences, max_context, engine=None):
        if engine and set(engine) != {"seed"}:
            raise ValueError(f"engine.{min(set(engine) - {'seed'})}: unknown; allowed: seed")
        LOADED.append((name, model, max_context, engine))
        seed = (engine or {}).get("seed", 0)
        super().__init__(name, BYTES, seed=seed, max_sequences=max_sequences, max_context=max_context)


def few(name, model, *, device):
    raise AssertionError("is not called")


def half(name, model, **options):
    return object()


NUMBER = 5
"""
GROUP = "token_swarm.backends"
OPTIONS = {"device": "cpu", "dtype": "auto", "threads": 1, "max_sequences": 8, "max_context": 64}


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {"letters": "lettersmith:Letters", "few": "lettersmith:few", "half": "lettersmith:half"}
    objects |= {"gone": "lettersmith:Gone", "absent": "no_such_module:X", "number": "lettersmith:NUMBER"}
    # The name of a built-in one changes nothing.
    objects |= {"transformers": "lettersmith:Letters"}
    install(tmp_path / "site", monkeypatch, "lettersmith", SOURCE, {GROUP: objects})


@pytest.mark.usefixtures("letters")
def test_a_backend_of_another_distribution_is_loaded() -> None:
    assert BACKENDS.names() == ("transformers", "vllm", "absent", "few", "gone", "half", "letters", "number")
    expert = load_expert("letters", "a", "m", engine={"seed": 3}, on_failure=lambda: None, **OPTIONS)
    assert expert.spec.name == "a"
    assert expert.spec.max_context == 64
    assert type(expert).__name__ == "Letters"
    assert BACKENDS.load("transformers").__name__ == "TransformersExpert"


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "few = lettersmith:few of token_swarm.backends: it does not take dtype, threads, max_seq"),
        ("half", "half = lettersmith:half of .*: a backend needs spec, encode, .* it lacks spec, encode, tokenize, st"),
        ("gone", "gone = lettersmith:Gone of token_swarm.backends: cannot be imported: .*no attribute 'Gone'"),
        ("absent", "absent = no_such_module:X of .*: cannot be imported: No module named 'no_such_module'"),
        ("number", "number = lettersmith:NUMBER of .*: a backend is a callable that returns an expert, not a int"),
    ],
)
def test_a_broken_one_is_named_with_what_is_missing(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message) as raised:
        load_expert(name, "a", "m", **OPTIONS)
    assert "\n" not in str(raised.value)
    # The others work.
    assert load_expert("letters", "a", "m", **OPTIONS).spec.name == "a"


@pytest.mark.usefixtures("letters")
def test_what_a_backend_refuses_is_an_error_of_loading() -> None:
    with pytest.raises(ExpertLoadError, match=r"engine.speed: unknown; allowed: seed"):
        load_expert("letters", "a", "m", engine={"speed": 1}, **OPTIONS)
    with pytest.raises(ExpertLoadError, match="engine: the transformers backend takes no options of its own"):
        load_expert("transformers", "a", "m", engine={"speed": 1}, **OPTIONS)
    with pytest.raises(UnknownName, match="no backend named 'llama'; known: absent, few"):
        load_expert("llama", "a", "m", **OPTIONS)


@pytest.mark.usefixtures("letters")
def test_a_configuration_may_name_it(tmp_path: Path) -> None:
    settings = load_settings(experts={"a": {"model": "x/y", "backend": "letters", "engine": {"seed": 3}}})
    assert settings.experts["a"].backend == "letters"
    with pytest.raises(ConfigError, match=r"experts.a: backend: 'letter'"):
        load_settings(experts={"a": {"model": "x/y", "backend": "letter"}})
    # What another interpreter has is for its process to say.
    load_settings(experts={"a": {"model": "x/y", "backend": "letter", "python": "/other/bin/python"}})
    broken = load_settings(experts={"a": {"model": "x/y", "backend": "half"}}).experts["a"]
    with pytest.raises(ExpertStartError, match="expert 'a': entry point half = lettersmith:half"):
        run_expert("a", "m", broken, f"unix:{tmp_path}/a.sock")


@pytest.mark.usefixtures("letters")
def test_a_search_uses_the_backend_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    experts = "".join(
        f"  {name}: {{model: {tmp_path / 'model'}, backend: letters, engine: {{seed: {seed}}}, max_context: 100}}\n"
        for name, seed in (("a", 1), ("b", 2))
    )
    (tmp_path / "config.yaml").write_text(f"experts:\n{experts}cache: {tmp_path / 'cache'}\n")
    lines = [json.dumps({"text": text}) + "\n" for text in ("ab", "ba", "cab", "c")]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    fixed = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--no-report", "--json"]
    small = ["--swarm-size", "4", "--iterations", "3", "--test", "0", "--rule", "linear"]
    data = ["--utility", "loglikelihood", "--data", str(tmp_path / "texts.jsonl")]
    result = CliRunner().invoke(app, ["search", *fixed, *small, *data])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["particle"]["weights"]) == {"a", "b"}
    import lettersmith  # type: ignore[import-not-found]

    assert {(name, engine["seed"]) for name, _, _, engine in lettersmith.LOADED} == {("a", 1), ("b", 2)}


@pytest.mark.usefixtures("letters")
def test_a_search_says_what_is_wrong_with_a_backend(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text(f"experts:\n  a: {{model: {tmp_path / 'model'}, backend: half}}\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "ab"}\n{"text": "ba"}\n')
    fixed = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--no-report", "--test", "0"]
    data = ["--utility", "loglikelihood", "--data", str(tmp_path / "texts.jsonl")]
    result = CliRunner().invoke(app, ["search", *fixed, *data])
    assert result.exit_code == 2
    assert "error: entry point half = lettersmith:half" in result.stderr
