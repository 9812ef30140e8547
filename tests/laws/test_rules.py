"""Rules of other distributions: mixed by their definition in every unit, refused in one line where they are none."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributions import install
from tests.laws.ensembles import DUPLICATES, GREEDY, LONG, NESTED, toys
from token_swarm import DecodeRequest, LocalEnsemble, Mixture, Particle, Rule, Sampling
from token_swarm.errors import BadParameter, PluginError, UnknownName
from token_swarm.kernels import dispatch, reference
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.log_unit import LogUnit
from token_swarm.mixing.native_unit import byte_unit_type
from token_swarm.rules import LINEAR, LOG_LINEAR, RULES

SOURCE = """
from dataclasses import replace

from token_swarm.rules import LINEAR, LOG_LINEAR, RuleKind

MEAN = replace(LINEAR, kernel=False)
PRODUCT = replace(LOG_LINEAR, kernel=False)


def _root(log_probs, weights):
    weights = weights.reshape(-1, *(1 for _ in log_probs.shape[1:]))
    return 2 * (weights.log() + log_probs / 2).logsumexp(0)


ROOT = RuleKind(_root, normalised=True)  # power mean of exponent 1/2
FAST = replace(LINEAR)
FIRST = RuleKind(lambda log_probs, weights: log_probs[0, 0], normalised=True)
TWICE = RuleKind(lambda log_probs, weights: 2 * log_probs.sum(0), normalised=True)
BROKEN = RuleKind(lambda log_probs, weights: log_probs.no_such(), normalised=True)
"""
NAMES = ("mean", "product", "root", "fast", "first", "twice", "broken")
KERNEL_OF = {"mean": Rule.LINEAR, "product": Rule.LOG_LINEAR}


@pytest.fixture(autouse=True)
def rulebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {name: f"rulebook:{name.upper()}" for name in NAMES} | {
        "source": "rulebook:SOURCE",
        "kind": "rulebook:_root",
    }
    install(tmp_path / "site", monkeypatch, "rulebook", SOURCE, {"token_swarm.rules": objects})
    monkeypatch.setattr(Rule, "_made", dict(Rule._made))


@pytest.mark.parametrize("name", KERNEL_OF)
@pytest.mark.parametrize("unit", [Unit.TOKEN, Unit.BYTE, Unit.UNION])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=5)], ids=["greedy", "drawn"])
def test_a_rule_without_a_kernel_writes_what_its_kernel_would(name: str, unit: Unit, sampling: Sampling) -> None:
    vocabularies = [NESTED, NESTED] if unit is Unit.TOKEN else [NESTED, DUPLICATES, NESTED]
    local = LocalEnsemble(toys(vocabularies, max_context=60))
    weights = {"e0": 0.5, "e1": 0.7, **({} if unit is Unit.TOKEN else {"e2": 0.3})}
    request = DecodeRequest(sampling=sampling, unit=unit, seed=3, max_bytes=25)
    temperatures = {"e1": 2.0}
    texts = [
        local.generate("cab", Mixture(weights, rule, temperatures), request)[0]
        for rule in (Rule(name), KERNEL_OF[name])
    ]
    assert texts[0] == texts[1]
    scores = [
        local.score("cab", "abcab", Mixture(weights, rule, temperatures)) for rule in (Rule(name), KERNEL_OF[name])
    ]
    assert scores[0].log_prob == pytest.approx(scores[1].log_prob, abs=1e-9)


@pytest.mark.parametrize("unit", [Unit.AUTO, Unit.UNION])
def test_one_hot_is_the_expert_alone_under_any_rule(unit: Unit) -> None:
    local = LocalEnsemble(toys([NESTED, LONG], max_context=60))
    request = DecodeRequest(unit=unit, seed=3, max_bytes=25)
    texts = {
        local.generate("cab", Mixture({"e0": 1.0, "e1": 0.0}, rule), request)[0]
        for rule in (*Rule, *map(Rule, ("mean", "product", "root")))
    }
    assert len(texts) == 1


def test_its_own_law_is_between_the_built_in_ones() -> None:
    """A power mean of exponent 1/2 lies between the geometric and the arithmetic mean, before they are normalised."""
    local, weights = LocalEnsemble(toys([NESTED, LONG], max_context=60)), {"e0": 0.5, "e1": 0.5}
    linear, root, log_linear = (
        local.score("cab", "abcab", Mixture(weights, rule)).log_prob
        for rule in (Rule.LINEAR, Rule("root"), Rule.LOG_LINEAR)
    )
    assert len({round(each, 9) for each in (linear, root, log_linear)}) == 3
    with pytest.raises(BadParameter, match="under the root rule"):
        Mixture({"e0": -1.0}, Rule("root"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [LINEAR, LOG_LINEAR], ids=["linear", "log-linear"])
def test_what_a_rule_says_is_what_its_kernel_does(dtype: torch.dtype, kind: object) -> None:
    torch.manual_seed(0)
    name, rule = ("mean", Rule.LINEAR) if kind is LINEAR else ("product", Rule.LOG_LINEAR)
    logits = [torch.randn(4, 50).to(dtype) for _ in range(3)]
    logits[1][2, 7] = torch.nan
    weights, heats = torch.rand(4, 3, dtype=torch.float64) + 0.1, torch.rand(4, 3, dtype=torch.float64) + 0.5
    allowed = torch.rand(50) > 0.2
    allowed[7] = True
    found = dispatch.mix(logits, weights, heats, Rule(name), allowed)
    expected = dispatch.mix(logits, weights, heats, rule, allowed)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-7)
    ones, keep = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    settings = (0.7 * ones, keep, ones, torch.zeros(4), torch.rand(4, dtype=torch.float64))
    drawn = [dispatch.sample(logits, weights, heats, each, allowed, *settings)[0] for each in (Rule(name), rule)]
    assert torch.equal(*drawn)
    laws = torch.log_softmax(torch.randn(6, 3, 20), -1)
    arguments = (laws, torch.arange(6), weights, torch.tensor([0, 2, 6]))
    if rule is Rule.LOG_LINEAR:
        expected = reference.score_log_linear(*arguments)
        torch.testing.assert_close(reference.score_combined(*arguments, Rule(name)), expected)


def test_a_rule_is_one_object_wherever_it_goes() -> None:
    for rule in (*Rule, Rule("root")):
        assert Rule(rule.value) is rule
        assert pickle.loads(pickle.dumps(rule)) is rule
        assert deepcopy(Mixture({"a": 1.0}, rule)).rule is rule
    assert repr(Rule("root")) == "Rule('root')"
    assert [rule.value for rule in Rule] == ["linear", "log-linear"]
    assert byte_unit_type(Rule("root")).__name__ == "ByteUnit"


def test_a_particle_names_its_rule(tmp_path: Path) -> None:
    particle = Particle("p", Mixture({"e0": 1.0}, Rule("root")))
    particle.save(tmp_path / "p.json")
    assert Particle.load(tmp_path / "p.json") == particle
    document = particle.to_json().replace('"root"', '"cube"')
    with pytest.raises(
        BadParameter, match=r"rule: 'cube' is not allowed; it must be one of \['linear', 'log-linear', 'b"
    ):
        Particle.from_json(document)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "kernel=True is for the built-in rules"),
        ("first", r"combine of \[1, 2, 3\] and \[2, 1, 3\] must give \[2, 3\] and \[1, 3\], not \[3\] and \[3\]"),
        ("twice", "combine of one member with weight 1 must be that member"),
        ("broken", "combine fails: 'Tensor' object has no attribute 'no_such'"),
        ("kind", "a rule is a RuleKind of token_swarm.rules, not a function"),
        ("source", "cannot be imported: .*no attribute 'SOURCE'"),
    ],
)
def test_a_broken_one_is_named_with_what_is_missing(name: str, message: str) -> None:
    with pytest.raises(
        PluginError, match=f"entry point {name} = rulebook:.* of token_swarm.rules: {message}"
    ) as raised:
        Rule(name)
    assert "\n" not in str(raised.value)
    assert Rule("root").value == "root"
    with pytest.raises(UnknownName, match="no rule named 'cube'"):
        Rule("cube")
    assert "cube" not in RULES.names()


@pytest.mark.parametrize("name", KERNEL_OF)
def test_logarithms_are_mixed_as_probabilities_are(name: str) -> None:
    local = LocalEnsemble(toys([NESTED, NESTED, LONG]))
    torch.manual_seed(0)
    rows = [torch.randn(8, dtype=torch.float64) for _ in range(2)]
    laws = [np.log(np.random.default_rng(seed).dirichlet(np.ones(257))) for seed in range(2)]
    found = []
    for rule in (Rule(name), KERNEL_OF[name]):
        mixture = Mixture({"e0": 0.2, "e1": 0.5, "e2": 0.3}, rule, {"e1": 2.0})
        unit = LogUnit(local.ensemble.groups(mixture), local.ensemble.tries, local.encode(mixture, "ab"))
        found.append((unit.groups[0].token_log_law(rows), unit.log_law(laws)))
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-12)
