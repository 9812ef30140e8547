"""The product with bfloat16 weights, at every level of instructions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from token_swarm.kernels import native
from token_swarm.kernels.linear import Bfloat16Linear, holds_in_bfloat16

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C++ kernels were not built")


@pytest.fixture(params=["baseline", "AVX2", "AVX-512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions that this processor has."""
    best = native.instruction_set()
    try:
        if native.instruction_set(request.param) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        native.instruction_set(best)


def weights(outputs: int, inner: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inner, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("outputs", "inner"), [(1, 1), (64, 256), (63, 257), (65, 31), (200, 640), (128, 1000)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_product_in_float64(outputs: int, inner: int, bias: bool) -> None:
    weight = weights(outputs, inner)
    offset = torch.randn(outputs) if bias else None
    product = Bfloat16Linear(weight, offset)
    for rows in [*range(15), 24, 33]:
        inputs = torch.randn(rows, inner)
        exact = inputs.double() @ weight.double().t() + (0 if offset is None else offset.double())
        # A float32 chain of 256 terms, each of which rounds by half a unit of the sum so far at most.
        bound = 2.0**-24 * (256 + inner / 256 + 2) * (inputs.abs().double() @ weight.abs().double().t() + 1)
        found = product(inputs)
        assert found.shape == (rows, outputs)
        assert (found.double() - exact).abs().le(bound).all()


@pytest.mark.usefixtures("level")
def test_rounds_less_than_a_chain_of_all_terms() -> None:
    """Root mean square against float64, beside one fused float32 sum from the first term to the last."""
    weight, inputs = weights(256, 2048), torch.randn(6, 2048, generator=torch.Generator().manual_seed(1))
    exact = inputs.double() @ weight.double().t()
    chain = torch.zeros(6, 256)
    for k in range(2048):
        chain = (chain.double() + inputs[:, k, None].double() * weight[:, k].double()).float()

    def error(found: Tensor) -> float:
        return float((found - exact).square().mean().sqrt())

    assert error(Bfloat16Linear(weight, None)(inputs)) < 0.6 * error(chain)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("inner", [96, 640])
def test_a_row_is_the_same_whatever_rows_are_beside_it(inner: int) -> None:
    product = Bfloat16Linear(weights(130, inner), torch.randn(130))
    inputs = torch.randn(40, inner)
    alone = torch.cat([product(inputs[row : row + 1]) for row in range(40)])
    for rows in range(1, 41):
        assert torch.equal(product(inputs[:rows]), alone[:rows]), rows


def test_every_leading_dimension_is_kept_and_gaps_are_read_over() -> None:
    weight = weights(70, 20)
    product = Bfloat16Linear(weight, None)
    inputs = torch.randn(2, 3, 40)[..., ::2]
    torch.testing.assert_close(product(inputs), inputs @ weight.t())


def test_values_that_are_no_numbers_stay_in_their_row() -> None:
    product, inputs = Bfloat16Linear(weights(64, 10), None), torch.ones(3, 10)
    inputs[1, 4] = torch.nan
    found = product(inputs)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_what_bfloat16_holds() -> None:
    weight = weights(2000, 8)
    assert holds_in_bfloat16(weight)
    weight[1999, 7] += 1e-3
    assert not holds_in_bfloat16(weight)
    assert not holds_in_bfloat16(torch.full((2, 2), torch.nan)), "NaN is refused, not packed"


@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (65, 17), (200, 96), (31, 640)])
@pytest.mark.parametrize("ordered", [True, False])
def test_weights_come_back_as_they_were_given(shape, ordered):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator).bfloat16().float()
    weight[0, 0], weight[-1, -1] = -0.0, torch.inf
    order = torch.randperm(shape[0], generator=generator) if ordered else torch.arange(shape[0])
    layer = Bfloat16Linear(weight, None, order if ordered else None)
    assert torch.equal(layer.rows(torch.arange(shape[0])).view(torch.int32), weight[order].view(torch.int32))
