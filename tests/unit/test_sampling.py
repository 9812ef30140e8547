from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm.errors import BadParameter
from token_swarm.mixing.sampling import Sampling


def by_sorting(law: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The definition: sort everything."""
    shaped = law.double() ** (1 / sampling.temperature)
    shaped = shaped / shaped.sum()
    shaped = torch.where(shaped >= sampling.min_p * shaped.max(), shaped, 0)
    if sampling.top_k:
        kth = shaped.sort(descending=True).values[min(sampling.top_k, len(shaped)) - 1]
        shaped = torch.where(shaped >= kth, shaped, 0)
    shaped = shaped / shaped.sum()
    ranked = shaped.sort(descending=True).values
    before = ranked.cumsum(0) - ranked
    smallest = ranked[before < sampling.top_p][-1]
    shaped = torch.where(shaped >= smallest, shaped, 0)
    return shaped / shaped.sum()


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(2, 4000),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 5, 2000]),
        top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 1.0]),
    ),
)
@settings(max_examples=150, deadline=None)
def test_shaping_equals_its_definition(seed: int, width: int, sampling: Sampling) -> None:
    law = torch.softmax(torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), 0)
    shaped = sampling.apply(law)
    torch.testing.assert_close(shaped, by_sorting(law, sampling), rtol=1e-9, atol=1e-15)
    assert float(shaped.sum()) == pytest.approx(1)


def test_small_temperatures_do_not_underflow() -> None:
    law = torch.full((1000,), 1e-3)
    assert float(Sampling(temperature=0.01).apply(law).sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 2.0),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadParameter, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
