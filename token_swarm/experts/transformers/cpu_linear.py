"""Linear layers for decoding on a CPU, where a step reads every weight for a handful of rows.

Weights that bfloat16 keeps are multiplied by a kernel of ours where one thread works (`kernels.linear`). Others, and
several threads: measured on one core with AVX2, float32, weight [49152, 576], milliseconds for 1 / 3 / 8 / 32 rows,
`F.linear` 15 / 45 / 59 / 123, oneDNN packed 13 / 16 / 25 / -, FBGEMM with float16 weights 8 / 9 / 21 / 100.
FBGEMM reads half the bytes and computes in float32, so it is exact where float16 holds the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from token_swarm.kernels import native
from token_swarm.kernels.linear import Bfloat16Linear, holds_in_bfloat16

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Packing: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], Product]

_FEW_ROWS = 32
"""From more rows on, `F.linear` is as fast as the packed products of torch."""

_CHAIN = 512
"""Longest partial sum of a packed product of several rows. FBGEMM and oneDNN add up the inner dimension in one chain
and round two to three times as much as `F.linear` does with AVX2 (root mean square, inner dimensions 576 to 2048); in
chains of at most 512, 1.3 to 1.6 times, and one chain more costs 10 microseconds a call. With one chain a step of
Gemma 3 on random tokens was up to 1.5e-3 from a fresh prefill, with `F.linear` 4e-4."""

_ROUNDING = 2.0**-23
"""Relative error of a weight matrix that disappears in the rounding of a float32 product."""


class PackedLinear(nn.Module):
    """A float32 `nn.Linear` whose weight bfloat16 keeps: that is all that is held of it, 2 bytes a weight.

    `outputs`: int64 [out features], the order in which the layer is to have its outputs.
    """

    def __init__(self, linear: nn.Linear, outputs: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        bias = None if linear.bias is None else linear.bias.detach()
        self.product = Bfloat16Linear(linear.weight.detach(), bias, outputs)
        # Where each output of the linear layer is among those of this one.
        self._places = None if outputs is None else torch.argsort(outputs)

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds."""
        return self.product.nbytes

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the linear layer, float32 [out features, in features], made anew at every call."""
        return self.rows(torch.arange(self.out_features))

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs of the linear layer, int64 [n]: float32 [n, in features]."""
        return self.product.rows(outputs if self._places is None else self._places[outputs])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in features] -> [..., out features]."""
        return self.product(inputs)


class CpuLinear(nn.Module):
    """A float32 `nn.Linear` with its weight packed for few rows, for the products of torch.

    The original parameters stay, shared with the embedding where they are tied. A packing takes 2 bytes per weight;
    products of several rows are summed in parts of at most `chain` inputs, which may need a second one.
    `outputs`: int64 [out features], the order in which the layer is to have its outputs.
    """

    def __init__(self, linear: nn.Linear, chain: int | None = _CHAIN, outputs: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._outputs = outputs
        self._one_row, self._few_rows = _products(*_in_order(linear, outputs), chain)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in features] -> [..., out features]."""
        rows = inputs.numel() // inputs.shape[-1]
        product = self._one_row if rows == 1 else self._few_rows if 1 < rows <= _FEW_ROWS else None
        if product is None:
            found = F.linear(inputs, self.weight, self.bias)
            return found if self._outputs is None else found[..., self._outputs]
        return product(inputs)


def packed_linear(
    linear: nn.Linear, threads: int, chain: int | None = _CHAIN, outputs: torch.Tensor | None = None
) -> PackedLinear | CpuLinear:
    """`linear`, float32, as the fastest layer that computes the same with so many threads."""
    if threads == 1 and native.library() is not None and holds_in_bfloat16(linear.weight.detach()):
        return PackedLinear(linear, outputs)
    return CpuLinear(linear, chain, outputs)


def pack_linears(
    model: nn.Module, threads: int, head: nn.Module | None = None, outputs: torch.Tensor | None = None
) -> None:
    """Replace every float32 `nn.Linear` of `model` by what `packed_linear` makes of it.

    What `head`, the last layer, rounds is not amplified by layers behind it: one chain is enough there. `outputs`: the
    order in which the head is to have its outputs.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                own = (None, outputs) if child is head else ()
                setattr(module, name, packed_linear(child, threads, *own))


def _in_order(linear: nn.Linear, outputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if outputs is None:
        return weight, bias
    return weight[outputs], None if bias is None else bias[outputs]


def holds_in_half_precision(weight: torch.Tensor) -> bool:
    """Whether rounding `weight` to float16 loses no more than a float32 product does anyway.

    True of weights that were stored as float16 and, their range permitting, as bfloat16.
    """
    lost = held = 0.0
    # Blocks that fit a cache: a vocabulary's weight takes seconds otherwise.
    for block in torch.split(weight, 1024):
        lost += float((block - block.half().float()).square().sum())
        held += float(block.square().sum())
    return lost <= _ROUNDING**2 * held


def _products(
    weight: torch.Tensor, bias: torch.Tensor | None, chain: int | None
) -> tuple[Product | None, Product | None]:
    """The fastest exact products of torch for one row and for few, None where `F.linear` is."""
    chains = 1 if chain is None else -(-weight.shape[1] // chain)
    if "fbgemm" in torch.backends.quantized.supported_engines and holds_in_half_precision(weight):
        one = _fbgemm_product(weight, bias)
        return one, one if chains == 1 else _chained(_fbgemm_product, weight, bias, chains)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None, _chained(_onednn_product, weight, bias, chains)
    return None, None


def _chained(pack: Packing, weight: torch.Tensor, bias: torch.Tensor | None, chains: int) -> Product:
    """The product as a sum over `chains` parts of the inner dimension."""
    size = -(-weight.shape[1] // chains)
    parts = [part.contiguous() for part in torch.split(weight, size, dim=1)]
    first, *others = [pack(part, None if index else bias) for index, part in enumerate(parts)]

    def product(inputs: torch.Tensor) -> torch.Tensor:
        pieces = [piece.contiguous() for piece in torch.split(inputs, size, dim=-1)]
        total = first(pieces[0])
        for multiply, piece in zip(others, pieces[1:], strict=True):
            total += multiply(piece)
        return total

    return product


def _fbgemm_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16.default(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda inputs: multiply(inputs, packed)


def _onednn_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda inputs: multiply(inputs, packed, bias, "none", [], "")
