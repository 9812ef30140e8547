"""How host code reaches the GPU: one place that allocates, one place that launches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 2048
"""Tokens per program: a vocabulary of 152k is 75 programs a row, so that two rows fill a large GPU."""

WARPS = 8
"""256 threads hold 8 tokens each: one 128-bit load of bfloat16 per expert, two of float32."""


def warps_for(experts: int) -> int:
    """Warps of a program that holds a tile of every expert: more of them for many experts, or registers run out."""
    return WARPS if experts <= 4 else 2 * WARPS


OPTIONS = {"enable_fp_fusion": False}
"""Of the compiler. a * b + c is fused where a kernel says so and nowhere else: sums that keep their rounding errors
depend on it."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over `grid`. An empty grid is nothing to do, which CUDA would refuse."""
    if all(grid):
        kernel[grid](*arguments, **constants, **OPTIONS)


def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory that a kernel is going to fill, on the device of `like`."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of `tensor` made current: Triton launches on the current one, whatever its arguments live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def settings(values: Tensor, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers per row as the kernels read them: contiguous, `dtype`, on the device of `like`."""
    return values.to(device=like.device, dtype=dtype).contiguous()


def rows_of(table: Tensor) -> Tensor:
    """`table` [rows, width] with its rows contiguous; rows may lie apart, as in a padded buffer."""
    return table if table.stride(-1) == 1 or table.shape[-1] <= 1 else table.contiguous()


def blocks_of(width: int) -> int:
    """How many programs share a row of `width`."""
    return -(-width // BLOCK)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`: Triton's blocks are powers of two."""
    return 1 << max(count - 1, 0).bit_length()
