"""Scores in logarithms: those of the plain scorer where it has the range, and finite where it has not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.score import Score
from token_swarm.experts.contract import Open
from token_swarm.experts.toy import ToyExpert
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary

TEXT = "abcbacabbcacb"
MIXTURES = [
    Mixture({"e0": 1.0}),
    Mixture({"e0": 0.5, "e1": 0.5}),
    Mixture({"e0": 0.5, "e1": 0.5, "e2": 0.25}),
    Mixture({"e0": 1.5, "e1": -0.5, "e2": 0.25}, temperatures={"e0": 0.5, "e2": 3.0}),
    Mixture({"e0": 0.7, "e1": 0.2, "e2": 0.1}, Rule.LINEAR, {"e1": 0.4}),
]


def local(sharpness: float = 2.0) -> LocalEnsemble:
    return LocalEnsemble(toys([NESTED, LONG, NESTED], sharpness=sharpness))


def scored(ensemble: LocalEnsemble, mixture: Mixture, text: str, *, in_logs: bool) -> Score:
    prompts = ensemble.encode(mixture, "ab")
    tokens = ensemble._tokens(prompts, text)
    return ensemble._score(mixture, prompts, text, tokens, in_logs=in_logs)


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda own: f"{own.rule.value} {own.weights}")
def test_both_scorers_agree(mixture: Mixture) -> None:
    plain, logs = (scored(local(), mixture, TEXT, in_logs=in_logs) for in_logs in (False, True))
    np.testing.assert_allclose(logs.per_byte, plain.per_byte, rtol=1e-9, atol=1e-9)
    assert logs.retired == pytest.approx(plain.retired)
    for name, own in plain.experts.items():
        np.testing.assert_allclose(logs.experts[name].per_byte, own.per_byte, rtol=1e-9, atol=1e-9)
        assert logs.experts[name].token_log_prob == pytest.approx(own.token_log_prob)


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture({"e0": 1000.0}),
        Mixture({"e0": -1000.0}),
        Mixture({"e0": 1000.0}, temperatures={"e0": 0.05}),
        Mixture({"e0": 1000.0, "e1": 1000.0}),
        Mixture({"e0": 1000.0, "e1": -1000.0, "e2": 3.0}),
        Mixture({"e0": 1.0, "e1": 1.0}, Rule.LINEAR, {"e0": 0.05, "e1": 0.05}),
    ],
    ids=repr,
)
def test_no_accepted_weight_makes_a_score_infinite(mixture: Mixture) -> None:
    ensemble = local(sharpness=8.0)
    score = ensemble.score("ab", TEXT, mixture)
    assert len(score.per_byte) == len(TEXT)
    assert math.isfinite(score.log_prob)
    assert score.log_prob < 0


def test_a_lone_expert_s_score_is_that_of_its_tokens() -> None:
    """Where every token is one byte the byte law is the token law: a softmax of weighted log-probabilities."""
    expert = ToyExpert("e0", Vocabulary((b"a", b"b", b"c"), ()), seed=1, sharpness=8.0)
    score = LocalEnsemble({"e0": expert}).score("ab", TEXT, Mixture({"e0": 1000.0}))
    tokens = expert.tokenize("ab" + TEXT)
    expected = []
    for length in range(2, len(tokens)):
        row = expert.step([Open(length, tokens[:length])]).logits[0].double()
        expected.append(float(torch.log_softmax(1000 * torch.log_softmax(row, 0), 0)[tokens[length]]))
    np.testing.assert_allclose(score.per_byte, expected, rtol=1e-9, atol=1e-9)
    assert min(expected) < -1000
