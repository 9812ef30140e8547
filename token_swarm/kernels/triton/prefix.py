"""Prefix sums over byte-sorted probabilities, in whole numbers.

Every probability becomes an integer count of 2^-61. Integer sums do not depend on how they are split over programs,
never decrease, and give an interval of probability 0 exactly 0; a parallel float64 scan promises none of the three. A
float32 is exact in this unit down to 2^-38; a smaller one is rounded by at most 2^-62, less than float64 loses beside a
sum of 1/2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.kernels.triton import launch

_UNIT = tl.constexpr(2.0**61)
_ONE = tl.constexpr(2.0**-61)


@triton.jit
def count_units(probability):
    """A float32 probability in units of 2^-61, rounded; NaN counts 0 and is put back where it stands."""
    return (tl.where(probability == probability, probability, 0.0) * _UNIT + 0.5).to(tl.int64)


@triton.jit
def gather_ordered(probabilities, stride, order, ordered, sums, tokens, block: tl.constexpr):
    """Grid (tiles, rows): the probabilities in sorted order (a gather; the order is read wide), and their sum."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < tokens
    place = tl.load(order + position, mask=inside, other=0)
    value = tl.load(probabilities + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(ordered + row * tokens + position, value, mask=inside)
    tl.store(sums + row * tl.num_programs(0) + tile, tl.sum(count_units(value), 0))


@triton.jit
def prefix_write(ordered, sums, cumulative, tokens, wide: tl.constexpr, block: tl.constexpr):
    """Grid (tiles, rows): C[i + 1] = the sum of all tiles before, and of this one up to and including i."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    other = tl.arange(0, wide)
    before = tl.sum(tl.load(sums + row * tl.num_programs(0) + other, mask=other < tile, other=0), 0)
    position = tile * block + tl.arange(0, block)
    inside = position < tokens
    value = tl.load(ordered + row * tokens + position, mask=inside, other=0.0).to(tl.float32)
    total = (before + tl.cumsum(count_units(value), 0)).to(tl.float64) * _ONE
    total = tl.where(value == value, total, float("nan"))
    out = cumulative + row * (tokens + 1)
    tl.store(out + position + 1, total, mask=inside)
    if tile == 0:
        tl.store(out, 0.0)


def prefix_mass(probabilities: Tensor, order: Tensor | int, every: int = 1) -> tuple[Tensor, Tensor]:
    """As `reference.prefix_mass`: (sorted probabilities [rows, tokens] in their dtype, C float64).

    The probabilities of a row have to sum to less than 4. A bad row (all NaN) gives NaN from C[1] on.
    """
    table = launch.rows_of(probabilities)
    order = torch.arange(order, device=table.device) if isinstance(order, int) else order
    rows, tokens = table.shape[0], order.numel()
    tiles = launch.blocks_of(tokens)
    with launch.on(table):
        ordered = launch.empty((rows, tokens), table.dtype, table)
        cumulative = launch.empty((rows, tokens + 1), torch.float64, table)
        if tokens == 0:
            return ordered, cumulative.zero_()[:, ::every].contiguous()
        sums = launch.empty((rows, tiles), torch.int64, table)
        order = launch.settings(order, table, torch.int64)
        constants = {"block": launch.BLOCK, "num_warps": launch.WARPS}
        launch.launch(gather_ordered, (tiles, rows), table, table.stride(0), order, ordered, sums, tokens, **constants)
        wide = launch.power_of_two(tiles)
        launch.launch(prefix_write, (tiles, rows), ordered, sums, cumulative, tokens, wide=wide, **constants)
        return ordered, cumulative[:, ::every].contiguous()
