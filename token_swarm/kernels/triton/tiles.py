"""What is kept of every tile of a probability row, so that choosing a token reads one tile and not the row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.kernels.triton import launch


class Tiles(NamedTuple):
    """sums: float64; tops: float32, the largest; firsts: int32, where it is first; lasts: int32, the last one above 0.

    [rows, tiles] each. A sum is NaN when a probability of the tile is.
    """

    sums: Tensor
    tops: Tensor
    firsts: Tensor
    lasts: Tensor

    @classmethod
    def empty(cls, rows: int, tiles: int, like: Tensor) -> Tiles:
        """Memory for the tiles of `rows` rows, on the device of `like`."""
        return cls(
            launch.empty((rows, tiles), torch.float64, like),
            launch.empty((rows, tiles), torch.float32, like),
            launch.empty((rows, tiles), torch.int32, like),
            launch.empty((rows, tiles), torch.int32, like),
        )


@triton.jit
def store_tile(tile, position, inside, sums, tops, firsts, lasts, slot):
    """Write what `choose` has to know of a tile of probabilities.

    Sum (float64; NaN as soon as one probability is), largest, the first position of it, and the last one above 0.
    """
    value = tl.where(inside, tile, 0.0)
    top = tl.max(tl.where(value == value, value, 0.0), 0)
    tl.store(sums + slot, tl.sum(value.to(tl.float64), 0))
    tl.store(tops + slot, top)
    tl.store(firsts + slot, tl.min(tl.where(inside & (value == top), position, 2147483647), 0))
    tl.store(lasts + slot, tl.max(tl.where(inside & (value > 0), position, -1), 0))


@triton.jit
def tile_statistics(probabilities, stride, width, sums, tops, firsts, lasts, block: tl.constexpr):
    """Grid (tiles, rows): what `pick` needs of each tile."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < width
    value = tl.load(probabilities + row * stride + position, mask=inside, other=0.0)
    store_tile(value, position, inside, sums, tops, firsts, lasts, row * tl.num_programs(0) + tile)


def statistics(table: Tensor) -> Tiles:
    """What `choose` needs of each tile of float32 rows [rows, width]."""
    (rows, width), tiles = table.shape, launch.blocks_of(table.shape[1])
    parts = Tiles.empty(rows, tiles, table)
    launch.launch(
        tile_statistics, (tiles, rows), table, table.stride(0), width, *parts,
        block=launch.BLOCK, num_warps=launch.WARPS,
    )  # fmt: skip
    return parts
