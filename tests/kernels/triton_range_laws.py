"""Triton at the bounds of what a request may ask for: as `triton_laws`, tests that take a `device`."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.test_ranges import assert_as_the_reference
from token_swarm import ranges
from token_swarm.kernels import reference, triton
from token_swarm.particle import Rule

HEATS = (ranges.EXPERT_TEMPERATURE.low, 1.0, ranges.EXPERT_TEMPERATURE.high)
WEIGHTS = (ranges.WEIGHT.high, ranges.WEIGHT.low, 1e-300, 5e-324, 1.0)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("scale", [0.0, 5.0, 1000.0])
def test_mix_at_the_bounds(device, rule, scale):
    random = torch.Generator().manual_seed(1)
    logits = [torch.randn(1, 70, generator=random) * scale for _ in range(2)]
    logits[0][0, 3] = -3.4e38  # a model's own mask
    allowed = torch.ones(70, dtype=torch.bool)
    for own, heat in itertools.product(itertools.product(WEIGHTS, WEIGHTS), HEATS):
        weights = torch.tensor([own]).double()
        weights = weights.abs() if rule is Rule.LINEAR else weights
        arguments = (weights, torch.full((1, 2), heat).double(), rule, allowed)
        ours = triton.mix([table.to(device) for table in logits], *arguments).cpu()
        assert_as_the_reference(ours, reference.mix(logits, *arguments), 2e-5)


@pytest.mark.parametrize("heat", [ranges.GREEDY_BELOW, 0.05, 1.0, ranges.TEMPERATURE.high])
def test_shape_at_the_bounds(device, heat):
    table = torch.softmax(torch.randn(3, 70, generator=torch.Generator().manual_seed(2)) * 3, 1)
    off = (torch.zeros(3).long(), torch.ones(3).double(), torch.zeros(3).double())
    heats = torch.full((3,), heat).double()
    ours = triton.shape(table.to(device), heats, *off).cpu()
    assert_as_the_reference(ours, reference.shape(table, heats, *off), 2e-5)
