"""The kernels that callers get, whatever implementation that is, against the float64 definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm import kernels
from token_swarm.errors import ExpertFault
from token_swarm.experts.toy import ToyExpert
from token_swarm.kernels import reference
from token_swarm.mixing.groups import make_groups
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 4),
    width=st.integers(2, 3000),
    rule=st.sampled_from(list(Rule)),
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
    arguments = (
        [row[None] for row in rows],
        torch.tensor([weights], dtype=torch.float64),
        torch.tensor([temperatures], dtype=torch.float64),
        rule,
        allowed,
    )
    mixed, expected = kernels.mix(*arguments)[0], reference.mix(*arguments)[0]
    assert mixed.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    if bool(expected.isnan().any()):
        assert mixed.isnan().all()
        return
    # The exponent's rounding is the probability's relative error: a sum of weighted logits, each with its own ulp.
    size = sum(
        (abs(w) if rule is Rule.LOG_LINEAR else 1) * float(row[row.isfinite()].abs().max()) / t
        for w, row, t in zip(weights, rows, temperatures, strict=True)
    )
    unit = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    # What is smaller than 1e-31 may be 0.
    torch.testing.assert_close(mixed.double(), expected, rtol=8 * unit * (1 + size), atol=1e-31)
    assert float(mixed[~allowed].abs().sum()) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_the_experts_fault(bad: float) -> None:
    spec = ToyExpert("toy", Vocabulary((b"a", b"b", None), eos_ids=(2,))).spec
    (group,) = make_groups({"toy": spec}, Mixture({"toy": 1.0}))
    row = torch.full((3,), bad)
    with pytest.raises(ExpertFault, match=r"toy.*logits hold NaN or .inf"):
        group.token_law([row])


def test_the_logits_are_left_alone() -> None:
    rows = [torch.randn(1, 64, dtype=dtype) for dtype in DTYPES]
    kept = [row.clone() for row in rows]
    weights = torch.full((1, len(rows)), 0.5, dtype=torch.float64)
    for rule in Rule:
        for chosen in (rows, rows[1:]):
            own = weights[:, : len(chosen)]
            kernels.mix(chosen, own, 4 * own, rule, torch.arange(64) > 3)
    for row, before in zip(rows, kept, strict=True):
        assert row.equal(before)


@given(seed=st.integers(0, 2**31), width=st.integers(2, 5000))
@settings(max_examples=50, deadline=None)
def test_prefix_mass_equals_the_reference(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(8 * torch.randn(width, generator=generator), 0)
    order = torch.randperm(width, generator=generator)[: max(1, width - 3)]
    ordered, total = kernels.prefix_mass(probabilities[None], order)
    expected_ordered, expected_total = reference.prefix_mass(probabilities[None], order)
    assert total.dtype == torch.float64
    assert ordered.equal(expected_ordered)
    np.testing.assert_allclose(total, expected_total, rtol=1e-12, atol=1e-15)
