"""Every kernel in use against its float64 definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm import kernels
from token_swarm.kernels import reference
from token_swarm.particle import Rule

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 4),
    width=st.integers(2, 3000),
    rule=st.sampled_from(Rule),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
)
@settings(max_examples=120, deadline=None)
def test_mix_equals_the_reference(
    seed: int, experts: int, width: int, rule: Rule, dtype: torch.dtype, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [(spread * torch.randn(width, generator=generator)).to(dtype) for _ in range(experts)]
    allowed = torch.rand(width, generator=generator) > 0.1
    allowed[0] = True
    rows[-1][1:][torch.rand(width - 1, generator=generator) < 0.05] = -torch.inf
    signed = torch.randn(experts, generator=generator).tolist()
    weights = [abs(w) + 0.01 for w in signed] if rule is Rule.LINEAR else signed
    temperatures = (0.5 + torch.rand(experts, generator=generator)).tolist()
    mixed = kernels.mix(rows, weights, temperatures, rule, allowed)
    expected = reference.mix(rows, weights, temperatures, rule, allowed)
    # The exponent's rounding is the probability's relative error: a sum of weighted logits, each with its own ulp.
    size = sum(
        (abs(w) if rule is Rule.LOG_LINEAR else 1) * float(row[row.isfinite()].abs().max()) / t
        for w, row, t in zip(weights, rows, temperatures, strict=True)
    )
    unit = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    torch.testing.assert_close(mixed.double(), expected, rtol=8 * unit * (1 + size), atol=1e-37)
    assert float(mixed[~allowed].abs().sum()) == 0


@pytest.mark.parametrize("mix", [kernels.mix, reference.mix])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_no_law_are_refused(mix: object, bad: float) -> None:
    row = torch.zeros(8)
    row[3] = bad
    with pytest.raises(ValueError, match="logits hold NaN or \\+inf"):
        mix([row], [1.0], [1.0], Rule.LINEAR, torch.ones(8, dtype=torch.bool))  # type: ignore[operator]
    with pytest.raises(ValueError, match="no allowed token has a finite logit"):
        mix([torch.full((8,), -torch.inf)], [1.0], [1.0], Rule.LINEAR, torch.ones(8, dtype=torch.bool))  # type: ignore[operator]


def test_the_logits_are_left_alone() -> None:
    rows = [torch.randn(64), torch.randn(64)]
    kept = [row.clone() for row in rows]
    for rule in Rule:
        kernels.mix(rows, [0.5, 0.5], [2.0, 1.0], rule, torch.arange(64) > 3)
    for row, before in zip(rows, kept, strict=True):
        assert row.equal(before)


@given(seed=st.integers(0, 2**31), width=st.integers(2, 5000))
@settings(max_examples=50, deadline=None)
def test_prefix_mass_equals_the_reference(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(8 * torch.randn(width, generator=generator), 0)
    order = torch.randperm(width, generator=generator)[: max(1, width - 3)]
    ordered, total = kernels.prefix_mass(probabilities, order)
    expected_ordered, expected_total = reference.prefix_mass(probabilities, order)
    assert total.dtype == torch.float64
    assert ordered.equal(expected_ordered)
    np.testing.assert_allclose(total, expected_total, rtol=1e-12, atol=1e-15)
