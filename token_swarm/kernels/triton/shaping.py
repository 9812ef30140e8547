"""Temperature, min-p, top-k and top-p without a sort: each is a threshold on the probabilities' bit patterns.

Non-negative floats are ordered as their bits are, and a temperature keeps the order. So the k-th largest value, and the
value at which the largest ones reach top-p, are found bit by bit, exactly. A histogram of the leading bits says which
tokens can matter; where at most CAPACITY do, they alone are searched, in registers. Otherwise the whole row is.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.kernels.triton import launch
from token_swarm.kernels.triton.tiles import Tiles, statistics, store_tile

CAPACITY = 2048
"""Candidates of one row that are searched in registers."""

_BINS = tl.constexpr(1024)
# The exponent and three bits of the fraction; everything from 2^1 on shares the last bin.
_BIN_SHIFT = tl.constexpr(20)
_NO_BITS = tl.constexpr(2147483647)


@triton.jit
def scaled(probability, top, exponent):
    """(p / top)^exponent in float64; the power is only taken where the exponent is not 1."""
    ratio = probability.to(tl.float64) * (1.0 / top)
    if exponent != 1:
        above = ratio > 0
        ratio = tl.where(above, tl.exp(tl.log(tl.where(above, ratio, 1.0)) * exponent), 0.0)
    return ratio


@triton.jit
def least_bits(top, exponent, min_p):
    """Bits of the smallest float32 p with (p / top)^exponent >= min_p.

    The inverse function is right to a unit or two, the neighbours are tried out.
    """
    guess = (top * tl.exp(tl.log(tl.where(min_p > 0, min_p, 1.0)) / exponent)).to(tl.float32)
    bits = tl.maximum(guess.to(tl.int32, bitcast=True) + tl.arange(0, 32) - 16, 1)
    ratio = bits.to(tl.float32, bitcast=True).to(tl.float64) / top
    passes = tl.exp(tl.log(ratio) * exponent) >= min_p
    if exponent == 1:
        passes = ratio >= min_p
    return tl.where(min_p > 0, tl.min(tl.where(passes, bits, _NO_BITS), 0), 0)


@triton.jit
def row_state(row, temperature, tops, sums, tiles, wide: tl.constexpr):
    """(whether the row is to be shaped at all, its largest probability as float64, the exponent)."""
    tile = tl.arange(0, wide)
    top = tl.max(tl.load(tops + row * tiles + tile, mask=tile < tiles, other=0.0), 0).to(tl.float64)
    total = tl.sum(tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0), 0)
    heat = tl.load(temperature + row)
    live = (heat != 0) & (total == total)
    return live, tl.where(live, top, 1.0), 1.0 / tl.where(live, heat, 1.0)


@triton.jit
def leading_bits(bits):
    """The histogram's bin of a float32 given as its bits."""
    return tl.minimum(bits >> _BIN_SHIFT, _BINS - 1)


@triton.jit
def candidate_cut(histogram, capacity: tl.constexpr):
    """(lowest bin from which on at most `capacity` tokens are counted, how many those are, how many there are)."""
    bins = tl.arange(0, _BINS)
    count = tl.load(histogram + bins)
    total = tl.sum(count, 0)
    above = total - tl.cumsum(count, 0) + count
    cut = tl.min(tl.where(above <= capacity, bins, _BINS), 0)
    return cut, tl.sum(tl.where(bins >= cut, count, 0), 0), total


@triton.jit
def census(
    probabilities, stride, width, sums, tops, temperature, top_k, top_p, min_p, histogram, masses,
    wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): the scaled mass that passes min-p, and the histogram of what passes."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    live, top, exponent = row_state(row, temperature, tops, sums, tl.num_programs(0), wide)
    if live:
        low = least_bits(top, exponent, tl.load(min_p + row))
        position = tile * block + tl.arange(0, block)
        value = tl.load(probabilities + row * stride + position, mask=position < width, other=0.0)
        bits = value.to(tl.int32, bitcast=True)
        passes = (bits >= low) & (value > 0)
        mass = tl.sum(tl.where(passes, scaled(value, top, exponent), 0.0), 0)
        tl.store(masses + row * tl.num_programs(0) + tile, mass)
        limit = tl.load(top_k + row)
        if ((limit > 0) & (limit < width)) | (tl.load(top_p + row) < 1):
            count = tl.histogram(leading_bits(bits), _BINS, mask=passes)
            tl.atomic_add(histogram + row * _BINS + tl.arange(0, _BINS), count, mask=count > 0)


@triton.jit
def collect(
    probabilities, stride, width, sums, tops, temperature, top_k, top_p, min_p, histogram, candidates, counts,
    wide: tl.constexpr, block: tl.constexpr, capacity: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): the positions of the tile's candidates, in order, at the tile's own place."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    live, top, exponent = row_state(row, temperature, tops, sums, tl.num_programs(0), wide)
    limit = tl.load(top_k + row)
    if live & (((limit > 0) & (limit < width)) | (tl.load(top_p + row) < 1)):
        low = least_bits(top, exponent, tl.load(min_p + row))
        cut, _, _ = candidate_cut(histogram + row * _BINS, capacity)
        position = tile * block + tl.arange(0, block)
        value = tl.load(probabilities + row * stride + position, mask=position < width, other=0.0)
        bits = value.to(tl.int32, bitcast=True)
        taken = ((bits >= low) & (value > 0) & (leading_bits(bits) >= cut)).to(tl.int32)
        place = tl.cumsum(taken, 0) - 1
        tl.store(candidates + row * width + tile * block + place, position, mask=taken > 0)
        tl.store(counts + row * tl.num_programs(0) + tile, tl.sum(taken, 0))


@triton.jit
def row_count(row, width, threshold, block: tl.constexpr):
    """How many probabilities of a row have at least the bits `threshold`."""
    count = 0
    for start in range(0, width, block):
        position = start + tl.arange(0, block)
        bits = tl.load(row + position, mask=position < width, other=0.0).to(tl.int32, bitcast=True)
        count += tl.sum(((bits >= threshold) & (position < width)).to(tl.int32), 0)
    return count


@triton.jit
def row_mass(row, width, threshold, top, exponent, block: tl.constexpr):
    """The scaled mass of a row's probabilities with at least the bits `threshold`."""
    mass = tl.full((), 0.0, tl.float64)
    for start in range(0, width, block):
        position = start + tl.arange(0, block)
        value = tl.load(row + position, mask=position < width, other=0.0)
        passes = value.to(tl.int32, bitcast=True) >= threshold
        mass += tl.sum(tl.where(passes, scaled(value, top, exponent), 0.0), 0)
    return mass


@triton.jit
def gather_candidates(
    candidates, counts, size, tiles, steps: tl.constexpr, block: tl.constexpr, capacity: tl.constexpr
):
    """Positions of the row's candidates, in order: tile after tile, found by bisection of the tiles' counts."""
    wide: tl.constexpr = 1 << steps
    tile = tl.arange(0, wide)
    count = tl.load(counts + tile, mask=tile < tiles, other=0)
    ends = tl.cumsum(count, 0)
    slot = tl.arange(0, capacity)
    own = tl.zeros((capacity,), tl.int32)
    for step in tl.static_range(steps):
        half = wide >> (step + 1)
        own = tl.where(tl.gather(ends, own + (half - 1), 0) <= slot, own + half, own)
    place = own * block + slot - tl.gather(ends - count, own, 0)
    return tl.load(candidates + place, mask=slot < size, other=0)


@triton.jit
def find_threshold(
    probabilities, stride, width, sums, tops, temperature, top_k, top_p, min_p, histogram, masses, candidates, counts,
    thresholds, normalisers, tiles,
    steps: tl.constexpr, block: tl.constexpr, capacity: tl.constexpr,
):  # fmt: skip
    """Grid (rows): bits of the smallest probability that stays, and the scaled mass of all that do.

    A normaliser of 0 says that the row stays as it is.
    """
    row = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = 1 << steps
    live, top, exponent = row_state(row, temperature, tops, sums, tiles, wide)
    if live:
        first = least_bits(top, exponent, tl.load(min_p + row))
        tile = tl.arange(0, wide)
        mass = tl.sum(tl.load(masses + row * tiles + tile, mask=tile < tiles, other=0.0), 0)
        limit = tl.load(top_k + row)
        nucleus = tl.load(top_p + row)
        if ((limit > 0) & (limit < width)) | (nucleus < 1):
            own = probabilities + row * stride
            _, size, total = candidate_cut(histogram + row * _BINS, capacity)
            slot = tl.arange(0, capacity)
            position = gather_candidates(
                candidates + row * width, counts + row * tiles, size, tiles, steps, block, capacity
            )
            value = tl.load(own + position, mask=slot < size, other=0.0)
            bits = tl.where(slot < size, value.to(tl.int32, bitcast=True), -1)
            share = tl.where(slot < size, scaled(value, top, exponent), 0.0)
            # Whether every token that may stay is a candidate.
            closed = size == total
            if (limit > 0) & (limit <= total) & (limit < width):
                kth = 0
                if limit <= size:
                    closed = limit <= size
                    for bit in range(31):
                        trial = kth | (1 << (30 - bit))
                        kth = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= limit, trial, kth)
                    first = tl.maximum(first, kth)
                    mass = tl.sum(tl.where(bits >= first, share, 0.0), 0)
                else:
                    for bit in range(31):
                        trial = kth | (1 << (30 - bit))
                        kth = tl.where(row_count(own, width, trial, block) >= limit, trial, kth)
                    first = tl.maximum(first, kth)
                    mass = row_mass(own, width, first, top, exponent, block)
            if nucleus < 1:
                within = tl.where(bits >= first, share / mass, 0.0)
                known = tl.sum(within, 0)
                reached = 0
                if closed | ((known >= nucleus) & (known > 0)):
                    for bit in range(31):
                        trial = reached | (1 << (30 - bit))
                        tail = tl.sum(tl.where(bits >= trial, within, 0.0), 0)
                        reached = tl.where((tail >= nucleus) & (tail > 0), trial, reached)
                    first = tl.maximum(first, reached)
                    mass = tl.sum(tl.where(bits >= first, share, 0.0), 0)
                else:
                    for bit in range(31):
                        trial = reached | (1 << (30 - bit))
                        tail = row_mass(own, width, tl.maximum(trial, first), top, exponent, block) / mass
                        reached = tl.where((tail >= nucleus) & (tail > 0), trial, reached)
                    first = tl.maximum(first, reached)
                    mass = row_mass(own, width, first, top, exponent, block)
        tl.store(thresholds + row, first)
        tl.store(normalisers + row, mass)
    else:
        tl.store(thresholds + row, 0)
        tl.store(normalisers + row, 0.0)


@triton.jit
def shape_write(
    probabilities, stride, out, out_stride, width, temperature, thresholds, normalisers, sums, tops, firsts, lasts,
    old_sums, old_tops, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): the shaped probabilities, and what `choose` needs of each tile. May work in place."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < width
    value = tl.load(probabilities + row * stride + position, mask=inside, other=0.0)
    _, top, exponent = row_state(row, temperature, old_tops, old_sums, tl.num_programs(0), wide)
    normaliser = tl.load(normalisers + row)
    if normaliser != 0:
        stays = (value.to(tl.int32, bitcast=True) >= tl.load(thresholds + row)) & (value > 0)
        value = tl.where(stays, scaled(value, top, exponent) / normaliser, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + position, value, mask=inside)
    store_tile(value, position, inside, sums, tops, firsts, lasts, row * tl.num_programs(0) + tile)


def shape(probabilities: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `reference.shape`, float32 [rows, width], for float32 probabilities; others are converted first."""
    table = launch.rows_of(probabilities.float())
    with launch.on(table):
        out = launch.empty(table.shape, torch.float32, table)
        shape_tiles(table, out, statistics(table), temperature, top_k, top_p, min_p)
        return out


def shape_tiles(
    table: Tensor, out: Tensor, parts: Tiles, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tiles:
    """Shape `table` into `out`, which may be the same memory; `parts` describes `table`. Returns the tiles of `out`."""
    (rows, width), tiles = table.shape, parts.sums.shape[1]
    heat = launch.settings(temperature, table)
    limits = (
        heat,
        launch.settings(top_k, table, torch.int32),
        launch.settings(top_p, table),
        launch.settings(min_p, table),
    )
    histogram = launch.empty((rows, _BINS.value), torch.int32, table).zero_()
    masses = launch.empty((rows, tiles), torch.float64, table)
    candidates = launch.empty((rows, width), torch.int32, table)
    counts = launch.empty((rows, tiles), torch.int32, table)
    thresholds = launch.empty((rows,), torch.int32, table)
    normalisers = launch.empty((rows,), torch.float64, table)
    shaped = Tiles.empty(rows, tiles, table)
    wide = launch.power_of_two(tiles)
    grid, own = (tiles, rows), (table, table.stride(0), width, parts.sums, parts.tops)
    constants = {"block": launch.BLOCK, "num_warps": launch.WARPS}
    launch.launch(census, grid, *own, *limits, histogram, masses, wide=wide, **constants)
    launch.launch(
        collect, grid, *own, *limits, histogram, candidates, counts, wide=wide, capacity=CAPACITY, **constants
    )
    launch.launch(
        find_threshold, (rows,), *own, *limits, histogram, masses, candidates, counts, thresholds, normalisers, tiles,
        steps=wide.bit_length() - 1, capacity=CAPACITY, **constants,
    )  # fmt: skip
    launch.launch(
        shape_write, grid, table, table.stride(0), out, out.stride(0), width, heat, thresholds, normalisers,
        *shaped, parts.sums, parts.tops, wide=wide, **constants,
    )  # fmt: skip
    return shaped
