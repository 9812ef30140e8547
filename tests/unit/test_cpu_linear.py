"""Packed linear layers give what `nn.Linear` gives, for every number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from token_swarm.experts.transformers import cpu_linear
from token_swarm.experts.transformers.cpu_linear import (
    CpuLinear,
    PackedLinear,
    holds_in_half_precision,
    pack_linears,
    packed_linear,
)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What the weights were stored in: each is packed in another way."""


def linear(*, bias: bool, stored: torch.dtype, inner: int = 96, outputs: int = 200) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inner, outputs, bias=bias).to(stored).float()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_layer(bias, stored, threads):
    plain = linear(bias=bias, stored=stored)
    packed = packed_linear(plain, threads, chain=30)
    with torch.inference_mode():
        for rows in (0, 1, 2, 3, 8, 31, 32, 33, 100):
            inputs = torch.randn(1, rows, 96)
            found, expected = packed(inputs), plain(inputs)
            assert found.shape == (1, rows, 200)
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_in_another_order(bias, stored):
    plain = linear(bias=bias, stored=stored)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    packed = packed_linear(plain, 1, chain=None, outputs=order)
    with torch.inference_mode():
        for rows in (1, 2, 32, 33):
            inputs = torch.randn(1, rows, 96)
            torch.testing.assert_close(packed(inputs), plain(inputs)[..., order], atol=2e-6, rtol=2e-6)


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this torch build has no FBGEMM"
)
def test_half_precision_is_used_only_where_it_is_exact():
    assert CpuLinear(linear(bias=True, stored=torch.float16))._one_row is not None
    assert CpuLinear(linear(bias=True, stored=torch.float32))._one_row is None


def summed_in_chains(inputs: torch.Tensor, weight: torch.Tensor, longest: int) -> torch.Tensor:
    """The product as float32 sums over equal parts of at most `longest` inputs, added up in order, each term fused."""
    total = torch.zeros(inputs.shape[0], weight.shape[0])
    size = -(-inputs.shape[1] // -(-inputs.shape[1] // longest))
    for part, own in zip(inputs.double().split(size, 1), weight.double().split(size, 1), strict=True):
        chain = torch.zeros_like(total)
        for column in range(part.shape[1]):
            chain = (chain.double() + part[:, column, None] * own[:, column]).float()
        total += chain
    return total


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("inner", [640, 2048])
def test_rounds_no_more_than_its_chains(inner, stored):
    """Root mean square against float64, which is steadier than the largest error. What `F.linear` rounds differs from
    processor to processor: the wider its vectors, the shorter its chains."""
    torch.manual_seed(2)
    plain = nn.Linear(inner, 500, bias=False).to(stored).float()
    packed, whole = CpuLinear(plain), CpuLinear(plain, chain=None)
    with torch.inference_mode():
        for rows in (1, 3, 8, 21):
            inputs = torch.randn(1, rows, inner)
            exact = inputs.double() @ plain.weight.double().t()

            def error(found, exact=exact):
                return float((found - exact).square().mean().sqrt())

            longest = inner if rows == 1 else cpu_linear._CHAIN
            most = 1.1 * error(summed_in_chains(inputs[0], plain.weight, longest))
            assert error(packed(inputs)) < most
            if rows > 1 and inner == 2048:
                assert error(whole(inputs)) > most, "a single chain rounds more, or this test could not fail"


def test_what_half_precision_holds():
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(2000, 64)
    assert holds_in_half_precision(weight.half().float())
    assert holds_in_half_precision(weight.bfloat16().float())
    assert holds_in_half_precision(torch.zeros(4, 4))
    assert not holds_in_half_precision(weight)
    assert not holds_in_half_precision(1e6 * weight.half().float())
    assert not holds_in_half_precision(1e-5 * weight.bfloat16().float())


def test_packing_keeps_tied_weights_tied_and_other_layers_alone():
    model = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 50)))
    model[2][0].weight = model[0].weight
    inputs = torch.randint(0, 50, (3,))
    with torch.inference_mode():
        expected = model(inputs)
        pack_linears(model, 1)
        torch.testing.assert_close(model(inputs), expected)
    assert isinstance(model[2][0], CpuLinear)
    assert model[2][0].weight is model[0].weight
    assert isinstance(model[1], nn.LayerNorm)


@pytest.mark.parametrize("outputs", [64, 200])
def test_a_packed_layer_gives_its_weights_back(outputs):
    plain = linear(bias=True, stored=torch.bfloat16, outputs=outputs)
    order = torch.randperm(outputs, generator=torch.Generator().manual_seed(1))
    for packed in (PackedLinear(plain), PackedLinear(plain, order)):
        assert torch.equal(packed.weight, plain.weight)
        assert torch.equal(packed.rows(torch.tensor([5, 0, 63, 5])), plain.weight[[5, 0, 63, 5]])
        padded = -(-outputs // 64) * 64
        assert packed.nbytes == padded * 96 * 2 + padded * 4


def test_other_dtypes_stay_plain():
    model = nn.Sequential(nn.Linear(8, 8).bfloat16())
    pack_linears(model, 1)
    assert type(model[0]) is nn.Linear
