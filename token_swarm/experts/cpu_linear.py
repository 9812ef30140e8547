"""Linear layers for decoding on a CPU, where a step reads every weight for a handful of rows.

Measured on one core with AVX2, float32, weight [49152, 576], milliseconds for 1 / 3 / 8 / 32 rows:
`F.linear` 15 / 45 / 59 / 123, oneDNN packed 13 / 16 / 25 / -, FBGEMM with float16 weights 8 / 9 / 21 / 100.
FBGEMM reads half the bytes and computes in float32, so it is exact where float16 holds the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Packing: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], Product]

_FEW_ROWS = 32
"""From more rows on, `F.linear` is as fast as the packed products."""

_CHAIN = 512
"""Longest partial sum of a packed product of several rows. FBGEMM and oneDNN add up the inner dimension in one chain
and round two to three times as much as `F.linear` does with AVX2 (root mean square, inner dimensions 576 to 2048); in
chains of at most 512, 1.3 to 1.6 times, and one chain more costs 10 microseconds a call. With one chain a step of
Gemma 3 on random tokens was up to 1.5e-3 from a fresh prefill, with `F.linear` 4e-4."""

_PANEL_BYTES = 5 << 20
"""FBGEMM goes through the whole weight once for every six rows; a part that stays in the cache is fetched once.
On the same core, weight [262144, 640], 1 / 6 / 8 / 12 rows: whole 23 / 30 / 54 / 60 ms, in parts 20 / 30 / 43 / 51."""

_ROUNDING = 2.0**-23
"""Relative error of a weight matrix that disappears in the rounding of a float32 product."""


class CpuLinear(nn.Module):
    """A float32 `nn.Linear` with its weight packed for one row and, in parts of at most `chain` inputs, for few rows.

    The original parameters stay, shared with the embedding where they are tied, and serve many rows. A float16
    packing takes 2 bytes per weight; one serves both where there is a single part, as with a `chain` of None.
    `outputs`: int64 [out features], the order in which the layer is to have its outputs.
    """

    def __init__(
        self, linear: nn.Linear, threads: int, chain: int | None = _CHAIN, outputs: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._outputs = outputs
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        if outputs is not None:
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        pack = _packing(weight, threads)
        halves = pack is not None and pack is not _onednn_product
        chains = 1 if chain is None else -(-linear.in_features // chain)
        self._one_row = pack(weight, bias) if pack and halves else None
        if chains == 1 and halves:
            self._few_rows = self._one_row
        else:
            self._few_rows = _chained(pack, weight, bias, chains) if pack else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in features] -> [..., out features]."""
        rows = inputs.numel() // inputs.shape[-1]
        product = self._one_row if rows == 1 else self._few_rows if 1 < rows <= _FEW_ROWS else None
        if product is None:
            found = F.linear(inputs, self.weight, self.bias)
            return found if self._outputs is None else found[..., self._outputs]
        return product(inputs)


def pack_linears(
    model: nn.Module, threads: int, head: nn.Module | None = None, outputs: torch.Tensor | None = None
) -> None:
    """Replace every float32 `nn.Linear` of `model` by a `CpuLinear`.

    What `head`, the last layer, rounds is not amplified by layers behind it: one chain is enough there. `outputs`: the
    order in which the head is to have its outputs.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                packed = CpuLinear(child, threads, None, outputs) if child is head else CpuLinear(child, threads)
                setattr(module, name, packed)


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


def _packing(weight: torch.Tensor, threads: int) -> Packing | None:
    """The fastest packing that keeps `weight` exact, None when torch was built with neither."""
    if "fbgemm" in torch.backends.quantized.supported_engines and holds_in_half_precision(weight):
        # Torch announces that it will drop the product for one thread; the threaded one then takes over.
        single = threads == 1 and hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
        return _single_product if single else _threaded_product
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return _onednn_product
    return None


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


def _single_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Some 30 microseconds less per call than the threaded product, but always on one thread."""
    multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
    offset = torch.zeros(weight.shape[0]) if bias is None else bias
    # Two bytes a weight; FBGEMM packs rows by sixteen.
    size = max(16, _PANEL_BYTES // (2 * weight.shape[1]) // 16 * 16)
    with warnings.catch_warnings():
        # Both functions say once per process that they are deprecated.
        warnings.simplefilter("ignore")
        panels = [
            (torch.fbgemm_pack_gemm_matrix_fp16(part.contiguous()), offset_part)
            for part, offset_part in zip(torch.split(weight, size), torch.split(offset, size), strict=True)
        ]
        multiply(weight[:1], *panels[0])
    if len(panels) == 1:
        packed, offset = panels[0]
        return lambda inputs: multiply(inputs, packed, offset)
    return lambda inputs: torch.cat([multiply(inputs, packed, offset) for packed, offset in panels], dim=-1)


def _threaded_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16.default(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda inputs: multiply(inputs, packed)


def _onednn_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda inputs: multiply(inputs, packed, bias, "none", [], "")
