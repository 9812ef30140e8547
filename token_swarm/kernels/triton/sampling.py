"""One token a row: the largest, or the inverse cumulative distribution at one uniform, from the sums of the tiles."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from token_swarm.kernels.triton import launch
from token_swarm.kernels.triton.mix import mix_tiles
from token_swarm.kernels.triton.shaping import shape_tiles
from token_swarm.kernels.triton.tiles import Tiles, statistics
from token_swarm.particle import Rule

_NOWHERE = tl.constexpr(2147483647)


@triton.jit
def pick(
    probabilities, stride, width, sums, tops, firsts, lasts, uniforms, greedy, tokens, log_probs, tiles,
    wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid (rows): find the tile in which the cumulative sum passes the uniform, then the token in that tile.

    The sums of tiles and of tokens are rounded differently, so that a tile may end before it reaches what its sum
    promised: then its last token above 0 is meant. A token of probability 0 is never taken.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, wide)
    there = tile < tiles
    own = tl.load(sums + row * tiles + tile, mask=there, other=0.0)
    top = tl.load(tops + row * tiles + tile, mask=there, other=-1.0)
    total = tl.sum(own, 0)
    passed = tl.cumsum(own, 0)
    target = tl.load(uniforms + row) * total

    hit = tl.min(tl.where(there & (passed > target) & (own > 0), tile, tiles), 0)
    within = tl.minimum(hit, tiles - 1)
    before = tl.sum(tl.where(tile == within - 1, passed, 0.0), 0)
    position = within * block + tl.arange(0, block)
    value = tl.load(probabilities + row * stride + position, mask=position < width, other=0.0).to(tl.float64)
    reached = (before + tl.cumsum(value, 0) > target) & (value > 0)
    sampled = tl.min(tl.where(reached, position, _NOWHERE), 0)
    sampled = tl.where(sampled == _NOWHERE, tl.load(lasts + row * tiles + within), sampled)
    final = tl.max(tl.load(lasts + row * tiles + tile, mask=there, other=-1), 0)
    sampled = tl.where(hit == tiles, final, sampled)

    first = tl.load(firsts + row * tiles + tile, mask=there, other=_NOWHERE)
    best = tl.min(tl.where(there & (top == tl.max(top, 0)), first, _NOWHERE), 0)
    token = tl.where(tl.load(greedy + row) != 0, best, sampled)
    token = tl.where(total == total, token, -1)
    probability = tl.load(probabilities + row * stride + token, mask=token >= 0, other=0.0).to(tl.float64)
    tl.store(tokens + row, token.to(tl.int64))
    log_prob = tl.log(tl.where(token >= 0, probability / total, 1.0))
    tl.store(log_probs + row, tl.where(token >= 0, log_prob, float("nan")))


def choose(probabilities: Tensor, uniforms: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.choose`, for float32 probabilities; others are converted first."""
    table = launch.rows_of(probabilities.float())
    with launch.on(table):
        return _pick(table, statistics(table), uniforms, greedy)


def sample(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    allowed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """`choose` of `shape` of `mix`, greedy where `temperature` is 0: (tokens int64 [rows], log-probabilities float64).

    Arguments as for the three functions. The mixture is shaped where it lies, and rows without top-k, top-p, min-p or
    temperature pass through. Nothing is read back to the host.
    """
    with launch.on(logits[0]):
        mixed, parts = mix_tiles(logits, weights, temperatures, rule, allowed)
        shaped = shape_tiles(mixed, mixed, parts, temperature, top_k, top_p, min_p)
        return _pick(mixed, shaped, uniforms, temperature == 0)


def _pick(table: Tensor, parts: Tiles, uniforms: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    (rows, width), tiles = table.shape, parts.sums.shape[1]
    tokens = launch.empty((rows,), torch.int64, table)
    log_probs = launch.empty((rows,), torch.float64, table)
    launch.launch(
        pick, (rows,), table, table.stride(0), width, *parts, launch.settings(uniforms, table),
        launch.settings(greedy, table, torch.bool).view(torch.uint8), tokens, log_probs, tiles,
        wide=launch.power_of_two(tiles), block=launch.BLOCK, num_warps=launch.WARPS,
    )  # fmt: skip
    return tokens, log_probs
