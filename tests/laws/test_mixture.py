"""Laws 3, 4 and 5: one-hot weights, invariances inside a group, and invariance of laws over text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.laws.ensembles import (
    BYTES,
    DUPLICATES,
    EXACT,
    GREEDY,
    LONG,
    NESTED,
    VOCABULARIES,
    byte_unit,
    settle,
    total_variation,
    toys,
    words,
)
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.toy import TextLawExpert, ToyExpert, random_text_law
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling, inverse_cdf
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary


def alone(expert: ToyExpert, prompt: str, sampling: Sampling, seed: int, count: int) -> bytes:
    """The model by itself: a plain token loop without any of the ensemble's code but the draw."""
    vocabulary = expert.spec.vocabulary
    allowed = torch.from_numpy(vocabulary.allowed.copy())
    tokens, random = expert.encode(prompt).tokens, np.random.default_rng(seed)
    start = len(tokens)
    while len(tokens) - start < count:
        logits = torch.where(allowed, expert.law(tokens), -torch.inf)
        law = torch.softmax(logits, -1).numpy()
        token = int(logits.argmax()) if sampling.greedy else inverse_cdf(law, float(random.random()))
        if token in vocabulary.eos_ids:
            break
        tokens = (*tokens, token)
    return vocabulary.text(tokens[start:])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("name", VOCABULARIES)
def test_one_hot_is_the_model_alone(name: str, unit: Unit, rule: Rule, sampling: Sampling) -> None:
    """Law 3: in every unit and rule, greedy and seeded, beside experts whose weight is 0."""
    experts = toys([NESTED, VOCABULARIES[name], LONG])
    local = LocalEnsemble(experts)
    mixture = Mixture({"e0": 0.0, "e1": 1.0, "e2": 0.0}, rule)
    for seed in range(3):
        request = DecodeRequest(sampling=sampling, unit=unit, seed=seed, max_tokens=40)
        text, finish = local.generate("cab", mixture, request)
        expert = experts["e1"]
        assert isinstance(expert, ToyExpert)
        assert text.encode() == alone(expert, "cab", sampling, seed, 40)
        assert finish.experts.keys() == {"e1"}
        assert finish.experts["e1"].share == 1.0


@pytest.mark.parametrize("rule", list(Rule))
def test_same_vocabulary_is_the_token_mixture(rule: Rule) -> None:
    """Law 4: experts of one vocabulary mix token by token, by the formula of the rule."""
    experts = toys([DUPLICATES, DUPLICATES])
    local = LocalEnsemble(experts)
    weights = (0.7, 0.3) if rule is Rule.LINEAR else (1.4, -0.5)
    mixture = Mixture(dict(zip(experts, weights, strict=True)), rule, temperatures={"e1": 2.0})
    groups = local.ensemble.groups(mixture)
    assert len(groups) == 1
    rows = [expert.law((0, 2)) for expert in experts.values()]  # type: ignore[attr-defined]
    allowed = torch.from_numpy(DUPLICATES.allowed.copy())
    laws = [torch.softmax(torch.where(allowed, row / t, -torch.inf), -1) for row, t in zip(rows, (1, 2), strict=True)]
    if rule is Rule.LINEAR:
        expected = 0.7 * laws[0] + 0.3 * laws[1]
    else:
        expected = torch.where(allowed, laws[0] ** 1.4 * laws[1] ** -0.5, 0).nan_to_num()
        expected /= expected.sum()
    np.testing.assert_allclose(groups[0].token_law(rows), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", list(Rule))
def test_reordering_and_duplicating_experts_change_nothing(rule: Rule) -> None:
    base = toys([NESTED, LONG])
    twin = ToyExpert("twin", LONG, seed=2)
    reordered = LocalEnsemble({"e1": base["e1"], "e0": base["e0"]})
    doubled = LocalEnsemble({**base, "twin": twin})
    total = 0
    for seed in range(8):
        request = DecodeRequest(sampling=Sampling(), seed=seed, max_bytes=12, epsilon=0.0, window=None)
        reference, _ = LocalEnsemble(base).generate("ab", Mixture({"e0": 0.4, "e1": 0.6}, rule), request)
        assert reordered.generate("ab", Mixture({"e1": 0.6, "e0": 0.4}, rule), request)[0] == reference
        split = Mixture({"e0": 0.4, "e1": 0.35, "twin": 0.25}, rule)
        assert doubled.generate("ab", split, request)[0] == reference
        total += len(reference)
    assert total > 40


def test_permuting_token_ids_changes_nothing() -> None:
    order = [5, 3, 0, 8, 2, 7, 1, 9, 4, 6]
    table = [DUPLICATES.token_bytes[old] for old in order]
    permuted = Vocabulary(tuple(table), tuple(order.index(eos) for eos in DUPLICATES.eos_ids))
    original = ToyExpert("e0", DUPLICATES, seed=1, order=0)

    class Renamed(ToyExpert):
        def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
            return original.law(tuple(order[token] for token in tokens))[order]

    other = LONG
    laws = []
    for first in (original, Renamed("e0", permuted, order=0)):
        experts = {"e0": first, "e1": ToyExpert("e1", other, seed=9)}
        local = LocalEnsemble(experts)
        unit = byte_unit(local, Mixture({"e0": 0.5, "e1": 0.5}), "cab")
        for byte in b"abc":
            settle(local, experts, unit)
            unit.advance(byte)
        settle(local, experts, unit)
        laws.append(unit.law())
    np.testing.assert_allclose(laws[0], laws[1], rtol=0, atol=1e-12)


PREFIX_CLOSED = Vocabulary((b"a", b"ab", b"abc", b"b", b"c", b"ca", None, None), eos_ids=(6,))
OTHER_CLOSED = Vocabulary((b"a", b"b", b"bc", b"bca", b"c", b"aa", b"aaa", None, None), eos_ids=(7,))


def union_law(experts: list[TextLawExpert], weights: tuple[float, ...], context: str) -> np.ndarray:
    """The mutant of law 5: mix token *strings* over the union vocabulary, then read off the next byte."""
    law = np.zeros(257)
    for expert, weight in zip(experts, weights, strict=True):
        vocabulary = expert.spec.vocabulary
        start = expert.encode("").tokens
        row = torch.where(
            torch.from_numpy(vocabulary.allowed.copy()), expert.law((*start, *expert.tokenize(context))), -torch.inf
        )
        for token, probability in enumerate(torch.softmax(row, -1).tolist()):
            data = vocabulary.token_bytes[token]
            if token in vocabulary.eos_ids:
                law[256] += weight * probability
            elif data is not None:
                law[data[0]] += weight * probability
    return law


@pytest.mark.parametrize("rule", list(Rule))
def test_equal_text_laws_ensemble_to_that_law(rule: Rule) -> None:
    """Law 5. The union unit, which reads each expert after one canonical tokenization, must fail it."""
    text_law = random_text_law(b"abc", seed=3, end=0.05)
    experts = {
        "e0": TextLawExpert("e0", PREFIX_CLOSED, text_law, seed=1),
        "e1": TextLawExpert("e1", OTHER_CLOSED, text_law, seed=2),
    }
    local = LocalEnsemble(experts)
    weights = {"e0": 0.3, "e1": 0.7}
    worst_union = 0.0
    for text in words("abc", 5)[::17]:
        unit = byte_unit(local, Mixture(weights, rule), "")
        for byte in text:
            settle(local, experts, unit)
            unit.advance(byte)
        settle(local, experts, unit)
        expected = text_law(text)
        np.testing.assert_allclose(unit.law(), expected, rtol=0, atol=1e-12)
        union = union_law(list(experts.values()), tuple(weights.values()), text.decode())
        worst_union = max(worst_union, total_variation(union, expected))
    assert worst_union > 0.01


def test_weights_that_cancel_inside_a_group() -> None:
    """W_g = 0 with signed weights: the group's law is the unnormalised product, and still a law."""
    experts = {"e0": ToyExpert("e0", BYTES, seed=1), "e1": ToyExpert("e1", BYTES, seed=2), **toys([LONG])}
    experts["e2"] = ToyExpert("e2", LONG, seed=4)
    local = LocalEnsemble(experts)
    unit = byte_unit(local, Mixture({"e0": 1.0, "e1": -1.0, "e2": 1.0}), "ab")
    settle(local, experts, unit)
    assert unit.law().sum() == pytest.approx(1.0, abs=1e-12)
    assert unit.law().max() < 1


def test_a_group_that_cannot_write_the_text_has_no_say() -> None:
    short = Vocabulary((b"a", b"b", None), eos_ids=(2,))
    experts = {"e0": ToyExpert("e0", short, seed=1), "e1": ToyExpert("e1", BYTES, seed=2)}
    local = LocalEnsemble(experts)
    unit = byte_unit(local, Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR), "ab", dataclasses.replace(EXACT))
    settle(local, experts, unit)
    unit.advance(ord("c"))  # e0 has no c
    settle(local, experts, unit)
    own = byte_unit(local, Mixture({"e1": 1.0}), "ab")
    settle(local, experts, own)
    own.advance(ord("c"))
    settle(local, experts, own)
    np.testing.assert_allclose(unit.law(), own.law(), rtol=0, atol=1e-12)
