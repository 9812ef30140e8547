"""The kernels in torch eager: float32 exponentials, float64 sums. Float64 logits stay float64 throughout.

What runs where the C++ kernels were not built, for float64 rows, and what the others are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from token_swarm.kernels import reference
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule

MOST_EXPONENT = 8
"""Weights over temperatures, added up over the experts, beyond which float32 has too few digits for the log-linear
rule: those rows are mixed in float64. As in csrc/mix.cpp."""


def mix(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    allowed: Tensor,
) -> Tensor:
    """As `reference.mix`; float32 [rows, width], or float64 when the logits are."""
    weights, temperatures = weights.to(logits[0].device), temperatures.to(logits[0].device)
    exact = any(table.dtype == torch.float64 for table in logits)
    if rule is Rule.LOG_LINEAR and not exact and bool(((weights / temperatures).abs().sum(1) > MOST_EXPONENT).any()):
        return mix([table.double() for table in logits], weights, temperatures, rule, allowed).float()
    mixed, bad = _mix(logits, weights, temperatures, rule, allowed)
    lost = mixed[:, 0].isnan() & ~bad[:, 0]
    if not exact and bool(lost.any()):
        # Finite logits whose products float32 cannot hold.
        wide = [table[lost].double() for table in logits]
        mixed[lost] = mix(wide, weights[lost], temperatures[lost], rule, allowed).float()
    return mixed.masked_fill_(bad, torch.nan) if bool(bad.any()) else mixed


def _mix(
    logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """The mixture in the dtype of the logits, at least float32, and which rows an expert poisons or nobody was asked
    for: bool [rows, 1]."""
    mixed: Tensor | None = None
    bad = (weights == 0).all(1, keepdim=True)
    total = weights.sum(1, keepdim=True)
    for index, table in enumerate(logits):
        weight = weights[:, index, None]
        if not bool(weight.any()):
            continue
        row = table if table.dtype in (torch.float32, torch.float64) else table.float()
        row = row.masked_fill(~allowed, -torch.inf)
        temperature = temperatures[:, index, None]
        top = row.amax(1, keepdim=True)
        bad = bad | ((weight != 0) & ~top.isfinite())
        if rule is Rule.LINEAR:
            if bool((temperature != 1).any()):
                # The largest is taken off first: dividing large logits would round away what tells them apart.
                row = row.sub_(top).div_(temperature.to(row.dtype))
            part = torch.softmax(row, dim=-1).mul_((weight / total).to(row.dtype))
        else:
            # The normalisers are constants of the row, so the weighted sum of raw logits has the same softmax.
            excluded = row == -torch.inf
            part = row.sub_(top).mul_((weight / temperature).to(row.dtype)).masked_fill_(excluded, -torch.inf)
        if bool((weight == 0).any()):
            part = torch.where(weight != 0, part, 0.0)
        mixed = part if mixed is None else mixed.add_(part)
    if mixed is None:
        return torch.full((weights.shape[0], allowed.numel()), torch.nan, device=weights.device), bad
    if rule is Rule.LOG_LINEAR:
        mixed = torch.softmax(mixed, dim=-1)
    return mixed, bad


def mix_union(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    union: UnionMap,
    floor: float,
) -> Tensor:
    """As `reference.mix_union`; float32 unless the logits are float64."""
    wide = any(table.dtype == torch.float64 for table in logits)
    return reference.mix_union(logits, weights, temperatures, rule, union, floor).to(
        torch.float64 if wide else torch.float32
    )


def shape(probabilities: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `reference.shape`, in the dtype of the probabilities."""
    rows = [
        _shape_row(row, *settings)
        for row, *settings in zip(
            probabilities, temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True
        )
    ]
    return torch.stack(rows)


def _shape_row(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    if temperature == 0 or (temperature, top_k, top_p, min_p) == (1, 0, 1, 0):
        return row
    # Scaled by the largest first: p^(1/T) of a small T would underflow to all zeros.
    shaped = row if temperature == 1 else (row / row.max()).pow(1 / temperature)
    threshold = min_p * float(shaped.max())
    if 0 < top_k < shaped.numel():
        threshold = max(threshold, float(torch.topk(shaped, top_k).values[-1]))
    # NaN is not below any threshold, so that a bad row stays bad.
    shaped = shaped.masked_fill(shaped < threshold, 0.0) if threshold > 0 else shaped
    shaped = shaped / shaped.sum()
    return _nucleus(shaped, top_p) if top_p < 1 and not bool(shaped[0].isnan()) else shaped


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most probable tokens whose mass reaches `top_p`; sorts candidates, not the vocabulary."""
    count = min(1024, probabilities.numel())
    while True:
        ranked = torch.topk(probabilities, count).values
        cumulative = torch.cumsum(ranked, 0, dtype=torch.float64)
        if count == probabilities.numel() or float(cumulative[-1]) >= top_p:
            break
        count = min(8 * count, probabilities.numel())
    last = min(int(torch.searchsorted(cumulative, top_p)), count - 1)
    kept = torch.where(probabilities >= ranked[last], probabilities, 0.0)
    return kept / kept.sum()


choose = reference.choose
prefix_mass = reference.prefix_mass


def softmax_masses(logits: Tensor, temperatures: Tensor, order: Tensor | int, tokens: int) -> tuple[Tensor, Tensor]:
    """As `reference.softmax_masses`; float32 probabilities unless the logits are float64."""
    picked = reference.in_order(logits, order)
    picked = picked if picked.dtype == torch.float64 else picked.float()
    top = picked.amax(1, keepdim=True)
    # The largest is taken off first: dividing large logits would round away what tells them apart.
    ordered = torch.softmax((picked - top).div_(temperatures[:, None].to(picked)), 1)
    ordered = ordered.masked_fill_(~top.isfinite(), torch.nan)
    return ordered, prefix_mass(ordered, tokens, reference.STRIDE)[1]


def score_linear(masses: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `reference.score_linear`; float64, because a small weight times a small mass underflows in float32."""
    return _by_item((weights.double() @ masses.double()).log_(), offsets)


def score_log_linear(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `reference.score_log_linear`, in the dtype of the cache and in pieces that fit the cache of a processor."""
    scores = torch.empty((weights.shape[0], targets.numel()), dtype=log_probs.dtype, device=log_probs.device)
    piece = max(1, 2**21 // max(1, weights.shape[0] * log_probs.shape[2]))
    own = weights.to(log_probs.dtype)
    for low in range(0, targets.numel(), piece):
        laws = log_probs[low : low + piece]
        joint = torch.einsum("pe,nes->pns", own, laws)
        joint = joint.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        at = targets[None, low : low + piece, None].expand(joint.shape[0], -1, 1)
        scores[:, low : low + piece] = joint.gather(2, at)[..., 0] - joint.logsumexp(2)
    unasked = (own == 0).any(1).nonzero()[:, 0].tolist()
    if unasked and bool(log_probs.isneginf().any()):
        # 0 * -inf excludes nothing: those particles are done without the experts they do not ask.
        for particle in unasked:
            scores[particle] = reference.score_log_linear(
                log_probs, targets, weights[particle, None], torch.arange(targets.numel() + 1)
            )[0].to(scores.dtype)
    return _by_item(scores, offsets)


def _by_item(scores: Tensor, offsets: Tensor) -> Tensor:
    lengths = offsets.diff()
    items = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths).to(scores.device)
    total = torch.zeros((scores.shape[0], lengths.numel()), dtype=torch.float64, device=scores.device)
    low, high = int(offsets[0]), int(offsets[-1])
    return total.index_add_(1, items, scores[:, low:high].double())
