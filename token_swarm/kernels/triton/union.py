"""Mixing over a union vocabulary: each expert's normaliser from its own row, then a gather per expert and union token.

Normalisers are read contiguously, each id as often as it takes part. The mixture walks the union's tokens, whose ids
are scattered over the experts' rows: those loads are gathers and cannot be wide. A tile lies inside one segment, so
that which experts have its tokens is one number, and so it starts anywhere: its loads of ids and its stores are not
wide either. Both rules read the logits twice: the floor of the log-linear rule bounds normalised probabilities. A
gather moves so many bytes per logit that its arithmetic may be float64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.errors import BadParameter
from token_swarm.kernels.triton import launch
from token_swarm.kernels.triton.arithmetic import LOG2E, NEGATIVE_INFINITY
from token_swarm.kernels.triton.mix import joint_combine, softmax_statistics
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule

MAX_EXPERTS = 31
"""Coverage is a bit per expert in an int32."""

# 2^-1074 is the smallest float64 above 0; the definition takes the logarithm of a float64 probability.
_UNDERFLOW = tl.constexpr(-1074.0)


@triton.jit
def union_write(
    logits, strides, weights, temperatures, top, total, ids, segments, twins, floor, out, size, tops, sums,
    experts: tl.constexpr, linear: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, rows). linear: the mixture; otherwise 2^(joint - the tile's largest), with that maximum and the sum.

    segments: int32 [tiles, 5]: union tokens low, high; bit e: expert e has them; twins low, high.
    twins: int32 [twins, 3]: expert, union token, id. top, total: [rows, experts], of `softmax_statistics`.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = tl.load(segments + tile * 5)
    high = tl.load(segments + tile * 5 + 1)
    coverage = tl.load(segments + tile * 5 + 2)
    first_twin = tl.load(segments + tile * 5 + 3)
    last_twin = tl.load(segments + tile * 5 + 4)
    position = low + tl.arange(0, block)
    inside = position < high
    mixed = tl.zeros((block,), tl.float64)
    possible = inside
    bad = tl.full((), 0.0, tl.float64)
    weight_sum = tl.full((), 0.0, tl.float64)
    users = 0
    for expert in tl.static_range(experts):
        slot = row * experts + expert
        weight = tl.load(weights + slot)
        scale = 1.0 / tl.load(temperatures + slot) * LOG2E
        best = tl.load(top + slot).to(tl.float64)
        normaliser = tl.log2(tl.load(total + slot))
        weight_sum += weight
        # The normaliser of a bad expert is NaN.
        bad += tl.where(weight != 0, normaliser, 0.0) * 0.0
        users += (weight != 0).to(tl.int32)
        mass = tl.zeros((block,), tl.float64)
        covered = ((coverage >> expert) & 1) != 0
        if covered & (weight != 0):
            place = tl.load(ids + expert * size + position, mask=inside, other=0)
            raw = tl.load(logits[expert] + row * strides[expert] + place, mask=inside, other=NEGATIVE_INFINITY)
            power = (raw.to(tl.float64) - best) * scale - normaliser
            mass = tl.where(power >= _UNDERFLOW, tl.exp2(power), 0.0)
            for twin in range(first_twin, last_twin):
                owner = tl.load(twins + twin * 3)
                if owner == expert:
                    also = tl.load(logits[expert] + row * strides[expert] + tl.load(twins + twin * 3 + 2))
                    power_also = (also.to(tl.float64) - best) * scale - normaliser
                    more = tl.where(power_also >= _UNDERFLOW, tl.exp2(power_also), 0.0)
                    mass += tl.where(position == tl.load(twins + twin * 3 + 1), more, 0.0)
        if linear:
            mixed += weight * mass
        elif weight != 0:
            log_mass = tl.where(mass > 0, tl.log2(tl.where(mass > 0, mass, 1.0)), NEGATIVE_INFINITY)
            log_mass = tl.maximum(log_mass, tl.load(floor) * LOG2E)
            possible &= log_mass > NEGATIVE_INFINITY
            mixed += weight * tl.where(log_mass > NEGATIVE_INFINITY, log_mass, 0.0)
    bad = tl.where(users == 0, float("nan"), bad)
    if linear:
        mixed = mixed / weight_sum + bad
        tl.store(out + row * size + position, mixed.to(tl.float32), mask=inside)
    else:
        best_joint = tl.max(tl.where(possible, mixed, NEGATIVE_INFINITY), 0)
        base = tl.where(best_joint == NEGATIVE_INFINITY, 0.0, best_joint)
        local = tl.where(possible, tl.exp2((mixed - base).to(tl.float32)), 0.0)
        tl.store(out + row * size + position, local, mask=inside)
        tl.store(tops + row * tl.num_programs(0) + tile, best_joint)
        tl.store(sums + row * tl.num_programs(0) + tile, tl.sum(local, 0).to(tl.float64) + bad)


@triton.jit
def union_scale(out, scale, segments, size, block: tl.constexpr):
    """Grid (tiles, rows): multiply each tile by its factor, in place."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(segments + tile * 5) + tl.arange(0, block)
    inside = position < tl.load(segments + tile * 5 + 1)
    value = tl.load(out + row * size + position, mask=inside, other=0.0)
    factor = tl.load(scale + row * tl.num_programs(0) + tile)
    tl.store(out + row * size + position, value * factor, mask=inside)


@dataclass(frozen=True)
class UnionTables:
    """A union map as the kernels walk it, on one device.

    ids: int32 [experts, size], twins: int32 [twins, 3], as in `UnionMap`; segments: int32 [tiles, 5], see
    `union_write`; counts: uint8 [width of the expert] per expert, how often each of its ids takes part.
    """

    ids: Tensor
    twins: Tensor
    segments: Tensor
    counts: tuple[Tensor, ...]

    @classmethod
    def build(cls, union: UnionMap, widths: Sequence[int], block: int, device: torch.device) -> UnionTables:
        """Tables for experts of `widths` logits. Raises BadParameter for too many experts or too narrow logits."""
        if len(widths) > MAX_EXPERTS:
            raise BadParameter("logits", f"{len(widths)} experts", f"at most {MAX_EXPERTS} experts in one union")
        counts = []
        for expert, width in enumerate(widths):
            ids = union.pairs(expert)[1]
            if ids.numel() and int(ids.max()) >= width:
                raise BadParameter(f"logits[{expert}]", f"{width} wide", f"wider than its largest id, {int(ids.max())}")
            counts.append(torch.bincount(ids, minlength=width).to(dtype=torch.uint8, device=device))
        bounds = [
            (low, min(low + block, segment.high), sum(1 << expert for expert in segment.experts))
            for segment in union.segments
            for low in range(segment.low, segment.high, block)
        ]
        tiles = torch.tensor(bounds, dtype=torch.int32).reshape(-1, 3)
        twins = torch.searchsorted(union.twins[:, 1].contiguous(), tiles[:, :2].contiguous(), out_int32=True)
        return cls(
            ids=union.ids.to(device).contiguous(),
            twins=union.twins.to(device).contiguous(),
            segments=torch.cat([tiles, twins], dim=1).to(device).contiguous(),
            counts=tuple(counts),
        )


_Key = tuple[int, tuple[int, ...], int, torch.device]
_known: dict[_Key, tuple[weakref.ref[UnionMap], UnionTables]] = {}


def tables_of(union: UnionMap, widths: Sequence[int], device: torch.device) -> UnionTables:
    """The tables of `union`, built once per device and kept as long as the map lives."""
    # By identity: a map's own hash would walk its quarter of a million texts at every call.
    key = (id(union), tuple(widths), launch.BLOCK, device)
    found = _known.get(key)
    if found is None or found[0]() is not union:
        tables = UnionTables.build(union, widths, launch.BLOCK, device)
        _known[key] = (weakref.ref(union, lambda _: _known.pop(key, None)), tables)
        return tables
    return found[1]


def mix_union(
    logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, union: UnionMap, floor: float
) -> Tensor:
    """As `reference.mix_union`, float32 [rows, union.size]. Raises BadParameter as `UnionTables.build`."""
    tables = tuple(launch.rows_of(table) for table in logits)
    like, rows, experts = tables[0], tables[0].shape[0], len(tables)
    known = tables_of(union, [table.shape[1] for table in tables], like.device)
    weights, temperatures = launch.settings(weights, like), launch.settings(temperatures, like)
    with launch.on(like):
        own = [
            softmax_statistics(
                [table], weights[:, e : e + 1].contiguous(), temperatures[:, e : e + 1].contiguous(), known.counts[e]
            )
            for e, table in enumerate(tables)
        ]
        top = torch.cat([each[0] for each in own], dim=1)
        total = torch.cat([each[1] for each in own], dim=1)
        out = launch.empty((rows, union.size), torch.float32, like)
        tiles = known.segments.shape[0]
        tops = launch.empty((rows, tiles), torch.float64, like)
        sums = launch.empty((rows, tiles), torch.float64, like)
        least = torch.full((1,), floor, dtype=torch.float64, device=like.device)
        launch.launch(
            union_write, (tiles, rows), tables, tuple(table.stride(0) for table in tables), weights, temperatures,
            top, total, known.ids, known.segments, known.twins, least, out, union.size, tops, sums,
            experts=experts, linear=rule is Rule.LINEAR, block=launch.BLOCK, num_warps=launch.WARPS,
        )  # fmt: skip
        if rule is Rule.LOG_LINEAR:
            scale = launch.empty((rows, tiles), torch.float32, like)
            wide = launch.power_of_two(tiles)
            launch.launch(joint_combine, (rows,), tops, sums, scale, tiles, wide=wide, num_warps=1)
            launch.launch(
                union_scale, (tiles, rows), out, scale, known.segments, union.size,
                block=launch.BLOCK, num_warps=launch.WARPS,
            )  # fmt: skip
        return out
