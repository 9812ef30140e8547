"""The kernels' definition, in float64 torch. Every faster version is tested against these functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from token_swarm.particle import Rule


def mix(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    temperatures: Sequence[float],
    rule: Rule,
    allowed: Tensor,
) -> Tensor:
    """Mix experts over one shared vocabulary into probabilities (DESIGN 3, inside a group).

    logits: one [width] row per expert; weights, temperatures: one number per expert; allowed: bool [width].
    linear: sum_e w_e softmax(l_e / T_e); log-linear: softmax(sum_e w_e log_softmax(l_e / T_e)).
    Returns float64 [width] that sums to 1, 0 where not allowed. Raises ValueError when a row holds NaN or +inf,
    or when no allowed token has a finite logit.
    """
    log_probs = [_log_softmax(row.double(), t, allowed) for row, t in zip(logits, temperatures, strict=True)]
    if rule is Rule.LINEAR:
        return sum((w * lp.exp() for w, lp in zip(weights, log_probs, strict=True)), torch.zeros(())) / sum(weights)
    # 0 * -inf is an expert that is not asked, not a NaN; a token that an expert with weight > 0 excludes stays out.
    joint = torch.zeros_like(log_probs[0])
    for weight, lp in zip(weights, log_probs, strict=True):
        if weight != 0:
            joint = joint + weight * lp
    joint[~allowed] = -torch.inf
    joint = joint.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    return torch.softmax(joint, dim=-1)


def _log_softmax(row: Tensor, temperature: float, allowed: Tensor) -> Tensor:
    if bool(torch.isnan(row).any()) or bool(torch.isposinf(row).any()):
        raise ValueError("logits hold NaN or +inf")
    masked = torch.where(allowed, row, -torch.inf)
    if bool(torch.isneginf(masked).all()):
        raise ValueError("no allowed token has a finite logit")
    return torch.log_softmax(masked / temperature, dim=-1)


def prefix_mass(probabilities: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities in byte-sorted order, and their cumulative sum.

    probabilities: [width]; order: int64 [tokens] ids sorted by bytes. Returns the sorted probabilities [tokens] and
    C, float64 [tokens + 1] with first entry 0, so that the mass of the sorted interval [lo, hi) is C[hi] - C[lo].
    float64 because a float32 sum is off by 15% at mass 1e-6.
    """
    ordered = probabilities[order]
    total = torch.zeros(order.numel() + 1, dtype=torch.float64)
    torch.cumsum(ordered.double(), dim=0, out=total[1:])
    return ordered, total
