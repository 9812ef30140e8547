"""A search under a rule of another distribution: scored by its definition, from the same cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from token_swarm_server.cli import app
from token_swarm_server.config.loading import ConfigError, load_settings
from token_swarm_server.search.remote import request_to_proto
from typer.testing import CliRunner

from tests.conftest import save_small_llama
from tests.distributions import install
from tests.laws.test_rules import KERNEL_OF, SOURCE
from token_swarm import DecodeRequest, LocalEnsemble, Mixture, Rule
from token_swarm.errors import BadParameter

SIZES = {"one": 270, "two": 270, "three": 290}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experts of one vocabulary and one of another, and three rules."""
    objects = {name: f"rulebook:{name.upper()}" for name in ("mean", "product", "root")}
    install(tmp_path / "site", monkeypatch, "rulebook", SOURCE, {"token_swarm.rules": objects})
    monkeypatch.setattr(Rule, "_made", dict(Rule._made))
    for seed, (name, vocabulary) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        save_small_llama(tmp_path / name, vocabulary)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the cat", "a hat")))
    return tmp_path


def learned(home: Path, rule: str, experts: tuple[str, ...]) -> dict[str, object]:
    models = "".join(f"  {name}: {{model: {home / name}, threads: 1}}\n" for name in experts)
    config, out = home / f"{'-'.join(experts)}.yaml", home / "runs" / "-".join((rule, *experts))
    config.write_text(f"experts:\n{models}cache: {home / 'cache'}\ncoordinator: {{rule: {rule}}}\n")
    fixed = ["--config", str(config), "--out", str(out), "--no-report", "--json", "--test", "0"]
    data = ["--utility", "loglikelihood", "--data", str(home / "texts.jsonl")]
    small = ["--optimiser", "random", "--swarm-size", "6", "--iterations", "1"]
    result = CliRunner().invoke(app, ["search", *fixed, *data, *small])
    assert result.exit_code == 0, result.output
    particle: dict[str, object] = json.loads(result.stdout)["particle"]
    return particle


@pytest.mark.parametrize("experts", [("one", "three"), ("one", "two"), ("one", "two", "three")], ids="-".join)
@pytest.mark.parametrize("name", KERNEL_OF)
def test_it_finds_what_the_kernel_of_the_same_rule_finds(home: Path, name: str, experts: tuple[str, ...]) -> None:
    found, expected = learned(home, name, experts), learned(home, KERNEL_OF[name].value, experts)
    assert found["rule"] == name
    assert found["weights"] == expected["weights"]
    assert found["dev_score"] == pytest.approx(expected["dev_score"], abs=1e-5)


def test_the_score_is_that_of_the_ensemble(home: Path) -> None:
    particle = learned(home, "root", tuple(SIZES))
    mixture = Mixture(particle["weights"], Rule("root"))  # type: ignore[arg-type]
    with LocalEnsemble.load({name: home / name for name in SIZES}, threads=1) as local:
        total = sum(local.score("", text, mixture).log_prob for text in ("the cat", "a hat"))
    assert total / len("the cata hat") == pytest.approx(particle["dev_score"], abs=1e-4)


def test_a_configuration_may_name_it_and_a_request_may_not(home: Path) -> None:
    settings = load_settings(experts={"a": {"model": "x/y"}}, coordinator={"rule": "root"})
    assert settings.coordinator.rule == "root"
    with pytest.raises(ConfigError, match=r"coordinator.rule: must be one of 'linear', 'log-linear', 'mean'"):
        load_settings(experts={"a": {"model": "x/y"}}, coordinator={"rule": "cube"})
    with pytest.raises(
        BadParameter, match=r"rule: 'root' is not allowed; it must be one of \['linear', 'log-linear'\]"
    ):
        request_to_proto("x", Mixture({"a": 1.0}, Rule("root")), DecodeRequest(), False)
