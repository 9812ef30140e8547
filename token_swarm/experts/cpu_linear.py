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

_FEW_ROWS = 32
"""From more rows on, `F.linear` is as fast as the packed products."""

_LONGEST_SUM = 1024
"""FBGEMM rounds sums over several rows more than `F.linear` does, which shows where they are long. Gemma 3 on
random tokens, largest error of a logit against float64: 1.8e-3 with FBGEMM everywhere, 5e-4 with `F.linear` for the
inner dimension of 2048, 3e-4 with `F.linear` everywhere. The time of a step stays within the noise."""

_ROUNDING = 2.0**-23
"""Relative error of a weight matrix that disappears in the rounding of a float32 product."""


class CpuLinear(nn.Module):
    """A float32 `nn.Linear` with a copy of its weight packed for few rows.

    The original parameters stay, shared with the embedding where they are tied, and serve many rows.
    """

    def __init__(self, linear: nn.Linear, threads: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        halves = _half_precision_product(weight, bias, threads)
        self._one_row = halves
        if halves is None:
            self._few_rows = _packed_product(weight, bias)
        else:
            self._few_rows = halves if linear.in_features <= _LONGEST_SUM else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in features] -> [..., out features]."""
        rows = inputs.numel() // inputs.shape[-1]
        product = self._one_row if rows == 1 else self._few_rows if 1 < rows <= _FEW_ROWS else None
        if product is None:
            return F.linear(inputs, self.weight, self.bias)
        return product(inputs)


def pack_linears(model: nn.Module, threads: int) -> None:
    """Replace every float32 `nn.Linear` of `model` by a `CpuLinear`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32:
                setattr(module, name, CpuLinear(child, threads))


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


def _half_precision_product(weight: torch.Tensor, bias: torch.Tensor | None, threads: int) -> Product | None:
    if "fbgemm" not in torch.backends.quantized.supported_engines or not holds_in_half_precision(weight):
        return None
    if threads > 1 or not hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation"):
        return _threaded_product(weight, bias)
    with warnings.catch_warnings():
        # Torch announces, once per process, that it will drop this product; the threaded one then takes over.
        warnings.simplefilter("ignore")
        product = _single_product(weight, bias)
        product(weight[:1])
    return product


def _single_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Some 30 microseconds less per call than the threaded product, but always on one thread."""
    packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
    multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
    offset = torch.zeros(weight.shape[0]) if bias is None else bias
    return lambda inputs: multiply(inputs, packed, offset)


def _threaded_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16.default(weight, bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda inputs: multiply(inputs, packed)


def _packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda inputs: multiply(inputs, packed, bias, "none", [], "")
