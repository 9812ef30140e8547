"""Law 2: byte log-probabilities add up to token log-probabilities, up to the other tokenizations and never below."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.laws.brute_force import BruteForce
from tests.laws.ensembles import BYTES, DUPLICATES, LONG, VOCABULARIES, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.errors import BadParameter, TextTooLong
from token_swarm.experts.toy import ToyExpert
from token_swarm.particle import Mixture, Rule

TEXTS = ["a", "abcab", "cabcabcabaaab", "abc" * 40]


def token_log_prob(expert: ToyExpert, context: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    allowed = torch.from_numpy(expert.spec.vocabulary.allowed.copy())
    total = 0.0
    for token in tokens:
        law = torch.log_softmax(torch.where(allowed, expert.law(context), -torch.inf), -1)
        total += float(law[token])
        context = (*context, token)
    return total


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_bytes_telescope_to_tokens(name: str, text: str) -> None:
    experts = toys([VOCABULARIES[name]])
    expert = experts["e0"]
    assert isinstance(expert, ToyExpert)
    local = LocalEnsemble(experts)
    score = local.score("", text, Mixture({"e0": 1.0}))
    own = score.experts["e0"]
    tokens = expert.tokenize(text)
    assert own.tokens == len(tokens)
    expected = token_log_prob(expert, expert.encode("").tokens, tokens)
    assert own.token_log_prob == pytest.approx(expected, abs=1e-9)
    assert own.log_prob >= own.token_log_prob - 1e-9
    assert len(own.per_byte) == len(score.per_byte) == len(text)
    assert score.log_prob == pytest.approx(own.log_prob, abs=1e-12)
    assert score.bits_per_byte() == pytest.approx(-own.log_prob / math.log(2) / len(text))
    if name == "bytes":  # one tokenization: equality
        assert own.log_prob == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rule", list(Rule))
def test_the_ensemble_mixes_what_the_experts_say(rule: Rule) -> None:
    """Vocabularies with one tokenization per text, where the canonical pass is exact."""
    experts = {"e0": ToyExpert("e0", BYTES, seed=1), "e1": ToyExpert("e1", BYTES, seed=2)}
    local = LocalEnsemble(experts)
    weights = {"e0": 0.3, "e1": 0.7}
    score = local.score("ab", "cabca", Mixture(weights, rule))
    brutes = [BruteForce(BYTES, expert.law, expert.encode("ab").tokens) for expert in experts.values()]
    for i in range(5):
        laws = [brute.next_law(b"cabca"[:i]) for brute in brutes]
        if rule is Rule.LINEAR:
            mixed = 0.3 * laws[0] + 0.7 * laws[1]
        else:
            mixed = laws[0] ** 0.3 * laws[1] ** 0.7
            mixed /= mixed.sum()
        assert score.per_byte[i] == pytest.approx(np.log(mixed[b"cabca"[i]]), abs=1e-9)


def test_groups_of_several_experts_and_temperatures() -> None:
    experts = {**toys([DUPLICATES, DUPLICATES]), "e2": ToyExpert("e2", LONG, seed=7)}
    local = LocalEnsemble(experts)
    mixture = Mixture({"e0": 0.5, "e1": -0.2, "e2": 0.7}, Rule.LOG_LINEAR, {"e2": 1.5})
    score = local.score("a", "bcabcaab", mixture)
    assert set(score.experts) == {"e0", "e1", "e2"}
    assert np.isfinite(score.per_byte).all()
    for name in experts:
        alone = local.score("a", "bcabcaab", Mixture({name: 1.0}))
        assert score.experts[name].per_byte == pytest.approx(alone.per_byte, abs=1e-12)
        assert score.experts[name].token_log_prob == pytest.approx(alone.experts[name].token_log_prob, abs=1e-12)
    assert all(not expert._held for expert in experts.values())  # type: ignore[attr-defined]


def test_what_cannot_be_scored_is_refused() -> None:
    local = LocalEnsemble({"e0": ToyExpert("e0", BYTES, max_context=8)})
    with pytest.raises(BadParameter, match="text"):
        local.score("a", "", Mixture({"e0": 1.0}))
    with pytest.raises(TextTooLong, match="e0"):
        local.score("a", "abcabcabc", Mixture({"e0": 1.0}))
