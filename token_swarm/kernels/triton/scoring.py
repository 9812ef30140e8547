"""Many particles against cached positions: what is read of the cache once serves a whole tile of particles.

Items are cut into chunks of positions, so that few long items fill a GPU as well as many short ones. A program writes
the score of its chunk under each of its particles, and a last kernel adds up chunks, in order: the same bits every
time. Scores are float64 throughout; only the exponentials of the log-linear rule, at most 1 each, are float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.kernels.triton import launch
from token_swarm.kernels.triton.arithmetic import INFINITY, LN2, LOG2E, NEGATIVE_INFINITY

POSITIONS = 512
"""Positions of the linear rule in one tile; a chunk may begin 15 before it, see `linear_scores`."""

GROUP = 64
"""Particles of one program of the linear rule: up to as many, masses come from memory once. Under the log-linear rule
that is a tile of particles; programs that read the same laws for other particles run beside it and find them in L2."""

SHORT = 1024
"""Laws of up to as many symbols (a byte law has 257) are tiled for many particles, longer ones for wide loads."""


@triton.jit
def linear_scores(
    masses, stride, positions, weights, spans, partial, particles, groups,
    experts: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    """Grid (chunks x groups): sum over a chunk of log(sum_e w_e m_e), for each of a group's particles.

    Loads start at a multiple of 16, so that they are wide wherever an item begins; what is not the chunk's is dropped.
    """
    program = tl.program_id(0)
    chunk, first = program // groups, program % groups * group
    low, high = tl.load(spans + chunk * 2), tl.load(spans + chunk * 2 + 1)
    position = low // 16 * 16 + tl.arange(0, block)
    own = (position >= low) & (position < high)
    for start in range(first, tl.minimum(first + group, particles), tile):
        particle = start + tl.arange(0, tile)
        mixed = tl.zeros((tile, block), tl.float64)
        for expert in tl.static_range(experts):
            mass = tl.load(masses + expert * stride + position, mask=position < positions, other=0.0).to(tl.float64)
            weight = tl.load(weights + particle * experts + expert, mask=particle < particles, other=0.0)
            mixed = tl.fma(weight[:, None] + tl.zeros_like(mixed), mass[None, :] + tl.zeros_like(mixed), mixed)
        zero = mixed == 0
        log = tl.where(zero, NEGATIVE_INFINITY, tl.log(tl.where(zero, 1.0, mixed)))
        score = tl.sum(tl.where(own[None, :], log, 0.0), 1)
        tl.store(partial + chunk * particles + particle, score, mask=particle < particles)


@triton.jit
def log_linear_scores(
    log_probs, targets, symbols, weights, spans, partial, particles, groups,
    experts: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (chunks x groups): sum over a chunk of j[target] - logsumexp(j), for each of a tile of particles.

    The maximum is kept online: joints of signed weights have no bound that is known before. In powers of 2.
    """
    program = tl.program_id(0)
    chunk, particle = program // groups, program % groups * tile + tl.arange(0, tile)
    known = particle < particles
    score = tl.zeros((tile,), tl.float64)
    for position in range(tl.load(spans + chunk * 2), tl.load(spans + chunk * 2 + 1)):
        law = log_probs + position * experts * symbols
        target = tl.load(targets + position)
        aim = tl.zeros((tile,), tl.float64)
        for expert in tl.static_range(experts):
            at_target = tl.load(law + expert * symbols + target).to(tl.float64)
            possible = tl.abs(at_target) < INFINITY
            share = tl.load(weights + particle * experts + expert, mask=known, other=0.0)
            aim += share * tl.where(possible, at_target, 0.0)
            aim += tl.where(share != 0, tl.where(possible, 0.0, NEGATIVE_INFINITY), 0.0)
        best = tl.full((tile,), NEGATIVE_INFINITY, tl.float64)
        total = tl.zeros((tile,), tl.float64)
        for start in range(0, symbols, block):
            symbol = start + tl.arange(0, block)
            inside = symbol < symbols
            joint = tl.zeros((tile, block), tl.float64)
            for expert in tl.static_range(experts):
                weight = tl.load(weights + particle * experts + expert, mask=known, other=0.0)
                value = tl.load(law + expert * symbols + symbol, mask=inside, other=0.0).to(tl.float64)
                finite = tl.abs(value) < INFINITY
                joint += weight[:, None] * tl.where(finite, value, 0.0)[None, :]
                # A sum never comes back from -inf: no term is +inf.
                ruled_out = tl.where(finite, 0.0, NEGATIVE_INFINITY).to(tl.float64)
                joint += tl.where((weight != 0)[:, None], ruled_out[None, :], 0.0)
            joint = tl.where(inside[None, :], joint * LOG2E, NEGATIVE_INFINITY)
            larger = tl.maximum(best, tl.max(joint, 1))
            base = tl.where(larger == NEGATIVE_INFINITY, 0.0, larger)
            powers = tl.exp2((joint - base[:, None]).to(tl.float32))
            total = total * tl.exp2(best - base) + tl.sum(powers, 1).to(tl.float64)
            best = larger
        some = total > 0
        normaliser = tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), NEGATIVE_INFINITY)
        score += aim - normaliser * LN2
    tl.store(partial + chunk * particles + particle, score, mask=known)


@triton.jit
def item_scores(partial, ranges, scores, particles, items, tile: tl.constexpr):
    """Grid (items, tiles of particles): add up an item's chunks."""
    item, particle = tl.program_id(0), tl.program_id(1) * tile + tl.arange(0, tile)
    score = tl.zeros((tile,), tl.float64)
    for chunk in range(tl.load(ranges + item), tl.load(ranges + item + 1)):
        score += tl.load(partial + chunk * particles + particle, mask=particle < particles, other=0.0)
    tl.store(scores + particle.to(tl.int64) * items + item, score, mask=particle < particles)


def score_linear(masses: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `reference.score_linear`: float64 [particles, items]. masses: [experts, positions] of any floating dtype."""
    table = launch.rows_of(masses)
    experts, positions = table.shape
    weights = launch.settings(weights, table)
    particles = weights.shape[0]
    with launch.on(table):
        spans, ranges = chunks_of(offsets, POSITIONS - 15, table)
        partial = launch.empty((spans.shape[0], particles), torch.float64, table)
        groups = -(-particles // GROUP)
        launch.launch(
            linear_scores, (spans.shape[0] * groups,), table, table.stride(0), positions, weights, spans, partial,
            particles, groups, experts=experts, tile=max(32 // launch.power_of_two(experts), 1), block=POSITIONS,
            group=GROUP, num_warps=4,
        )  # fmt: skip
        return by_item(partial, ranges)


def score_log_linear(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `reference.score_log_linear`: float64 [particles, items]. log_probs: of any floating dtype."""
    laws = log_probs.contiguous()
    _, experts, symbols = laws.shape
    weights = launch.settings(weights, laws)
    particles = weights.shape[0]
    short = symbols <= SHORT
    # 16 byte laws of three experts are 48 KiB; a law over a vocabulary is work for a program by itself. As many
    # particles as registers hold, with a weight for every expert.
    length, block = (16, 32) if short else (1, 1024)
    tile = min(max((128 if short else 16) // launch.power_of_two(experts), 1), launch.power_of_two(particles))
    with launch.on(laws):
        spans, ranges = chunks_of(offsets, length, laws)
        partial = launch.empty((spans.shape[0], particles), torch.float64, laws)
        groups = -(-particles // tile)
        launch.launch(
            log_linear_scores, (spans.shape[0] * groups,), laws, launch.settings(targets, laws, torch.int64), symbols,
            weights, spans, partial, particles, groups,
            experts=experts, tile=tile, block=block, num_warps=8 if short else 4,
        )  # fmt: skip
        return by_item(partial, ranges)


def chunks_of(offsets: Tensor, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Items cut into chunks of at most `length` positions.

    Returns (spans int64 [chunks, 2], the positions [low, high) of each; ranges int64 [items + 1], the chunks of item i
    are ranges[i] to ranges[i + 1]) on the device of `like`.
    """
    offsets = offsets.cpu().long()
    low, high = offsets[:-1], offsets[1:]
    counts = (high - low + length - 1) // length
    ranges = torch.zeros(max(offsets.numel(), 1), dtype=torch.int64)
    torch.cumsum(counts, 0, out=ranges[1:])
    item = torch.repeat_interleave(torch.arange(low.numel()), counts)
    start = low[item] + (torch.arange(item.numel()) - ranges[item]) * length
    spans = torch.stack([start, torch.minimum(start + length, high[item])], dim=1)
    return launch.settings(spans, like, torch.int64), launch.settings(ranges, like, torch.int64)


def by_item(partial: Tensor, ranges: Tensor) -> Tensor:
    """Scores of chunks, float64 [chunks, particles], added up by item: float64 [particles, items]."""
    particles, items = partial.shape[1], ranges.numel() - 1
    scores = launch.empty((particles, items), torch.float64, partial)
    launch.launch(
        item_scores, (items, -(-particles // 128)), partial, ranges, scores, particles, items, tile=128, num_warps=4
    )
    return scores
