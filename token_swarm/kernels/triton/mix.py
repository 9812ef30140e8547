"""Mixing over one shared vocabulary: the logits are read where they lie and converted in registers.

Linear reads them twice (each expert's normaliser, then the mixture). Log-linear reads them once: the normalisers are
constants of the row, so a tile writes 2^(joint - its own maximum), and what is left is to scale each tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.kernels.triton import launch
from token_swarm.kernels.triton.arithmetic import (
    INFINITY,
    LN2,
    LOG2E,
    NEGATIVE_INFINITY,
    relative_exponential,
    split,
    two_sum,
)
from token_swarm.kernels.triton.tiles import Tiles, store_tile
from token_swarm.particle import Rule

# The joint of the log-linear rule is held in units of 2^32, where no sum of weighted float32 logits overflows as long
# as the weights over the temperatures stay below 2^31. A power of two costs no digits.
SHRINK = tl.constexpr(2.0**-32)
GROW = tl.constexpr(2.0**32)

_NO_PARTS = (None,) * len(Tiles._fields)


@triton.jit
def softmax_partials(
    logits, strides, weights, temperatures, counts, tops, sums, width,
    experts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): each expert's largest logit in the tile and its sum of exponentials.

    A token is added up as often as `counts` (uint8 [width]) says; one of count 0 is not looked at. NaN or +inf in
    another one makes the sum NaN.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < width
    count = tl.load(counts + position, mask=inside, other=0)
    for expert in tl.static_range(experts):
        end = tl.where(tl.load(weights + row * experts + expert) != 0, width, 0)
        raw = tl.load(logits[expert] + row * strides[expert] + position, mask=position < end, other=NEGATIVE_INFINITY)
        value = tl.where(count > 0, raw.to(tl.float32), NEGATIVE_INFINITY)
        broken = (value != value) | (value == INFINITY)
        value = tl.where(broken, NEGATIVE_INFINITY, value)
        top = tl.max(value, 0)
        base = tl.where(top == NEGATIVE_INFINITY, 0.0, top)
        high, low = split(1.0 / tl.load(temperatures + row * experts + expert) * LOG2E)
        total = tl.sum(count.to(tl.float32) * relative_exponential(value, base, high, low), 0).to(tl.float64)
        slot = (row * experts + expert) * tl.num_programs(0) + tile
        tl.store(tops + slot, top)
        tl.store(sums + slot, tl.where(tl.max(broken.to(tl.int32), 0) > 0, float("nan"), total))


@triton.jit
def softmax_combine(
    weights, temperatures, tops, sums, top, total, share, tiles,
    experts: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Grid (rows): each expert's largest logit, its normaliser, and its weight over the sum of weights and normaliser.

    A share of NaN is how a bad row is told to the kernel that writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, wide)
    weight_sum = tl.full((), 0.0, tl.float64)
    users = 0
    for expert in tl.static_range(experts):
        weight = tl.load(weights + row * experts + expert)
        weight_sum += weight
        users += (weight != 0).to(tl.int32)
    for expert in tl.static_range(experts):
        slot = row * experts + expert
        weight = tl.load(weights + slot)
        scale = 1.0 / tl.load(temperatures + slot) * LOG2E
        tile_top = tl.load(tops + slot * tiles + tile, mask=tile < tiles, other=NEGATIVE_INFINITY)
        tile_sum = tl.load(sums + slot * tiles + tile, mask=tile < tiles, other=0.0)
        best = tl.max(tile_top, 0)
        base = tl.where(best == NEGATIVE_INFINITY, 0.0, best)
        # A poisoned tile may have no finite logit at all: its NaN has to get through.
        lives = (tile_top > NEGATIVE_INFINITY) | (tile_sum != tile_sum)
        distance = tl.where(tile_top > NEGATIVE_INFINITY, tile_top.to(tl.float64) - base.to(tl.float64), 0.0)
        normaliser = tl.sum(tl.where(lives, tile_sum * tl.exp2(distance * scale), 0.0), 0)
        normaliser = tl.where(best == NEGATIVE_INFINITY, float("nan"), normaliser)
        own = tl.where(weight != 0, weight / (weight_sum * normaliser), 0.0)
        own = tl.where(users == 0, float("nan"), own)
        tl.store(top + slot, base)
        tl.store(total + slot, tl.where(weight != 0, normaliser, 1.0))
        tl.store(share + slot, own)


@triton.jit
def linear_write(
    logits, strides, weights, temperatures, allowed, top, share, out, width,
    sums, tops, firsts, lasts, experts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): the weighted mean of the experts' probabilities, and, unless `sums` is None, what `choose`
    needs of it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < width
    keep = tl.load(allowed + position, mask=inside, other=0) > 0
    mixed = tl.zeros((block,), tl.float32)
    for expert in tl.static_range(experts):
        slot = row * experts + expert
        end = tl.where(tl.load(weights + slot) != 0, width, 0)
        raw = tl.load(logits[expert] + row * strides[expert] + position, mask=position < end, other=NEGATIVE_INFINITY)
        value = tl.where(keep, raw.to(tl.float32), NEGATIVE_INFINITY)
        high, low = split(1.0 / tl.load(temperatures + slot) * LOG2E)
        own = relative_exponential(value, tl.load(top + slot), high, low)
        mixed = tl.fma(own, tl.load(share + slot).to(tl.float32), mixed)
    tl.store(out + row * width + position, mixed, mask=inside)
    if sums is not None:
        store_tile(mixed, position, inside, sums, tops, firsts, lasts, row * tl.num_programs(0) + tile)


@triton.jit
def joint_write(
    logits, strides, weights, temperatures, allowed, out, tops, sums, width,
    experts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows): 2^(joint - the tile's largest joint), with that maximum and the tile's sum.

    Signed weights cancel: the joint is summed with the rounding errors kept, so that the exponent is as good
    as its own float32, not as that of its largest term.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < width
    keep = tl.load(allowed + position, mask=inside, other=0) > 0
    joint = tl.zeros((block,), tl.float32)
    rest = tl.zeros((block,), tl.float32)
    possible = keep
    broken = keep & False
    users = 0
    for expert in tl.static_range(experts):
        slot = row * experts + expert
        weight = tl.load(weights + slot)
        users += (weight != 0).to(tl.int32)
        end = tl.where(weight != 0, width, 0)
        raw = tl.load(logits[expert] + row * strides[expert] + position, mask=position < end, other=0.0)
        value = tl.where(keep, raw.to(tl.float32), 0.0)
        broken |= (value != value) | (value == INFINITY)
        possible &= value != NEGATIVE_INFINITY
        value = tl.where(tl.abs(value) < INFINITY, value, 0.0)
        high, low = split(weight * LOG2E / tl.load(temperatures + slot) * SHRINK)
        term = value * high
        term_rest = tl.fma(value, low, tl.fma(value, high, -term))
        joint, error = two_sum(joint, term)
        rest += error + term_rest
    # Now the larger part decides which joint is the largest, and the rest only among equals.
    joint, rest = two_sum(joint, rest)
    best = tl.max(tl.where(possible, joint, NEGATIVE_INFINITY), 0)
    base = tl.where(best == NEGATIVE_INFINITY, 0.0, best)
    base_rest = tl.max(tl.where(possible & (joint == base), rest, NEGATIVE_INFINITY), 0)
    base_rest = tl.where(base_rest == NEGATIVE_INFINITY, 0.0, base_rest)
    distance, error = two_sum(joint, -base)
    power, small = two_sum(distance * GROW, (rest - base_rest + error) * GROW)
    # Below 2^-200 the correction may be infinite; the result is 0 anyway.
    local = tl.where(possible & (power > -200), tl.exp2(power) * (1 + small * LN2), 0.0)
    tl.store(out + row * width + position, local, mask=inside)
    slot = row * tl.num_programs(0) + tile
    bad = (tl.max(broken.to(tl.int32), 0) > 0) | (users == 0)
    tl.store(tops + slot, (best.to(tl.float64) + base_rest.to(tl.float64)) * GROW)
    tl.store(sums + slot, tl.where(bad, float("nan"), tl.sum(local, 0).to(tl.float64)))


@triton.jit
def joint_combine(tops, sums, scale, tiles, wide: tl.constexpr):
    """Grid (rows): what each tile of a row has to be multiplied by; NaN for a bad row. Maxima in powers of 2."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, wide)
    tile_top = tl.load(tops + row * tiles + tile, mask=tile < tiles, other=NEGATIVE_INFINITY)
    tile_sum = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0)
    best = tl.max(tile_top, 0)
    lives = tile_top > NEGATIVE_INFINITY
    factor = tl.where(lives, tl.exp2(tl.where(lives, tile_top - best, 0.0)), 0.0)
    normaliser = tl.sum(tl.where(tile_sum == tile_sum, tile_sum * factor, float("nan")), 0)
    normaliser = tl.where(best == NEGATIVE_INFINITY, float("nan"), normaliser)
    tl.store(scale + row * tiles + tile, (factor / normaliser).to(tl.float32), mask=tile < tiles)


@triton.jit
def scale_write(out, scale, width, sums, tops, firsts, lasts, block: tl.constexpr):
    """Grid (tiles, rows): multiply each tile by its factor, in place, and, unless `sums` is None, write what `choose`
    needs of it."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tile * block + tl.arange(0, block)
    inside = position < width
    slot = row * tl.num_programs(0) + tile
    value = tl.load(out + row * width + position, mask=inside, other=0.0) * tl.load(scale + slot)
    tl.store(out + row * width + position, value, mask=inside)
    if sums is not None:
        store_tile(value, position, inside, sums, tops, firsts, lasts, slot)


def mix(logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, allowed: Tensor) -> Tensor:
    """As `reference.mix`, float32 [rows, width]. float64 logits are rounded to float32."""
    with launch.on(logits[0]):
        return _mix(logits, weights, temperatures, rule, allowed, None)


def mix_tiles(
    logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, allowed: Tensor
) -> tuple[Tensor, Tiles]:
    """`mix`, and what `choose` needs of its tiles, so that sampling does not read the rows again."""
    rows, width = logits[0].shape
    parts = Tiles.empty(rows, launch.blocks_of(width), logits[0])
    return _mix(logits, weights, temperatures, rule, allowed, parts), parts


def _mix(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    allowed: Tensor,
    parts: Tiles | None,
) -> Tensor:
    """The mixture. `parts`: filled with what `choose` needs of it."""
    tables = tuple(launch.rows_of(table) for table in logits)
    (rows, width), experts, tiles = tables[0].shape, len(tables), launch.blocks_of(tables[0].shape[1])
    strides = tuple(table.stride(0) for table in tables)
    weights, temperatures = launch.settings(weights, tables[0]), launch.settings(temperatures, tables[0])
    allowed = launch.settings(allowed, tables[0], torch.bool).view(torch.uint8)
    out = launch.empty((rows, width), torch.float32, tables[0])
    constants = {"experts": experts, "block": launch.BLOCK, "num_warps": launch.warps_for(experts)}
    grid = (tiles, rows)
    if rule is Rule.LINEAR:
        top, _, share = softmax_statistics(tables, weights, temperatures, allowed)
        launch.launch(
            linear_write, grid, tables, strides, weights, temperatures, allowed, top, share, out, width,
            *(parts or _NO_PARTS), **constants,
        )  # fmt: skip
        return out
    tops = launch.empty((rows, tiles), torch.float64, out)
    sums = launch.empty((rows, tiles), torch.float64, out)
    launch.launch(
        joint_write, grid, tables, strides, weights, temperatures, allowed, out, tops, sums, width,
        **constants,
    )  # fmt: skip
    rescale(out, tops, sums, parts)
    return out


def softmax_statistics(
    tables: Sequence[Tensor], weights: Tensor, temperatures: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit (float32), normaliser and share (float64) of every row and expert, [rows, experts] each."""
    rows, width = tables[0].shape
    experts, tiles = len(tables), launch.blocks_of(width)
    tops = launch.empty((rows, experts, tiles), torch.float32, tables[0])
    sums = launch.empty((rows, experts, tiles), torch.float64, tables[0])
    strides = tuple(table.stride(0) for table in tables)
    launch.launch(
        softmax_partials, (tiles, rows), tuple(tables), strides, weights, temperatures, counts, tops, sums, width,
        experts=experts, block=launch.BLOCK, num_warps=launch.WARPS,
    )  # fmt: skip
    top = launch.empty((rows, experts), torch.float32, tables[0])
    total = launch.empty((rows, experts), torch.float64, tables[0])
    share = launch.empty((rows, experts), torch.float64, tables[0])
    launch.launch(
        softmax_combine, (rows,), weights, temperatures, tops, sums, top, total, share, tiles,
        experts=experts, wide=launch.power_of_two(tiles), num_warps=1,
    )  # fmt: skip
    return top, total, share


def rescale(out: Tensor, tops: Tensor, sums: Tensor, parts: Tiles | None) -> None:
    """Turn tiles of 2^(joint - own maximum) into probabilities, in place. tops, sums: float64 [rows, tiles]; `parts` as
    of `_mix`."""
    (rows, width), tiles = out.shape, tops.shape[1]
    scale = launch.empty((rows, tiles), torch.float32, out)
    wide = launch.power_of_two(tiles)
    launch.launch(joint_combine, (rows,), tops, sums, scale, tiles, wide=wide, num_warps=1)
    launch.launch(
        scale_write, (tiles, rows), out, scale, width, *(parts or _NO_PARTS),
        block=launch.BLOCK, num_warps=launch.WARPS,
    )  # fmt: skip
