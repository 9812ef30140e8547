"""The CPU kernels on the demo experts' vocabularies: their masks, their byte orders and the union of both."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.integration.test_real_vocabularies import NAMES, load
from tests.kernels.cases import assert_probabilities
from token_swarm.kernels import STRIDE, UnionMap, native, reference
from token_swarm.mixing.trie import ByteTrie
from token_swarm.particle import Rule

pytestmark = [
    pytest.mark.real_experts,
    pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built here"),
]


def logits_of(name: str, rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, load(name)[1].width, generator=random) * 4).to(dtype)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("name", NAMES)
def test_mix_and_prefix_mass(name: str, rule: Rule) -> None:
    vocabulary = load(name)[1]
    allowed = torch.from_numpy(vocabulary.allowed.copy())
    logits = [logits_of(name, 2, seed, dtype) for seed, dtype in enumerate((torch.float32, torch.bfloat16))]
    weights = torch.tensor([[0.7, 0.3], [1.3, 0.2]], dtype=torch.float64)
    temperatures = torch.tensor([[1.0, 0.8], [1.0, 1.0]], dtype=torch.float64)
    mixed = native.mix(logits, weights, temperatures, rule, allowed)
    assert_probabilities(mixed, reference.mix(logits, weights, temperatures, rule, allowed))
    order = torch.from_numpy(ByteTrie.build(vocabulary).order)
    ordered, cumulative = native.prefix_mass(mixed, order)
    expected, sums = reference.prefix_mass(mixed, order)
    assert torch.equal(ordered, expected)
    torch.testing.assert_close(cumulative, sums, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_softmax_masses_are_mix_and_prefix_mass(name: str) -> None:
    """Of an expert alone: the law that mixing gives, in the order of its bytes."""
    vocabulary = load(name)[1]
    order, eos = ByteTrie.build(vocabulary).order, list(vocabulary.eos_ids)
    logits = logits_of(name, 2, 5, torch.bfloat16)
    heat = torch.tensor([1.0, 0.7], dtype=torch.float64)
    every = torch.tensor([*order.tolist(), *eos])
    ordered, sums = native.softmax_masses(logits, heat, every, order.size)
    allowed = torch.from_numpy(vocabulary.allowed.copy())
    mixed = reference.mix([logits], torch.ones(2, 1, dtype=torch.float64), heat[:, None], Rule.LINEAR, allowed)
    assert_probabilities(ordered, mixed[:, every])
    exact = reference.prefix_mass(mixed, torch.from_numpy(order), STRIDE)[1]
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("rule", Rule)
def test_union(rule: Rule) -> None:
    union = UnionMap.build([load(name)[1] for name in NAMES])
    # Whatever some experts share and the others lack.
    everyone = range(len(NAMES))
    shared = {some for size in everyone for some in itertools.combinations(everyone, size + 1)}
    assert {segment.experts for segment in union.segments} == shared
    assert union.twins.shape[0] > 0  # Gemma writes some bytes with two ids
    logits = [logits_of(name, 2, seed, torch.float32) for seed, name in enumerate(NAMES)]
    weights = torch.tensor([[0.5, 0.3, 0.2], [1.2, 0.4, 0.1]], dtype=torch.float64)
    arguments = (logits, weights, torch.ones(2, 3, dtype=torch.float64), rule, union, math.log(1e-6))
    assert_probabilities(native.mix_union(*arguments), reference.mix_union(*arguments))
