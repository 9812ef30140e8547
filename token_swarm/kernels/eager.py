"""The kernels in torch eager: float32 exponentials, float64 sums. Float64 logits stay float64 throughout."""

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
    """As `reference.mix`; float32 [width], or float64 when the logits are."""
    rows = [_prepare(row, t, allowed) for row, t in zip(logits, temperatures, strict=True)]
    if rule is Rule.LINEAR:
        total = sum(weights)
        mixed = torch.softmax(rows[0], dim=-1).mul_(weights[0] / total)
        for weight, row in zip(weights[1:], rows[1:], strict=True):
            mixed.add_(torch.softmax(row, dim=-1), alpha=weight / total)
        return mixed
    if len(rows) == 1 and weights[0] == 1:
        return torch.softmax(rows[0], dim=-1)
    # The experts' normalisers are constants of the row, so the weighted sum of raw logits has the same softmax.
    joint = torch.zeros_like(rows[0])
    for weight, row in zip(weights, rows, strict=True):
        if weight != 0:
            joint.add_(row - row.max(), alpha=weight)
    joint.masked_fill_(~(allowed & torch.isfinite(joint)), -torch.inf)
    return torch.softmax(joint, dim=-1)


def _prepare(row: Tensor, temperature: float, allowed: Tensor) -> Tensor:
    row = row if row.dtype in (torch.float32, torch.float64) else row.float()
    masked = row.masked_fill(~allowed, -torch.inf)
    top = float(masked.max())  # NaN and +inf both show here: max propagates NaN
    if not -torch.inf < top < torch.inf:
        raise ValueError("logits hold NaN or +inf, or no allowed token has a finite logit")
    return masked if temperature == 1 else masked.div_(temperature)


def prefix_mass(probabilities: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.prefix_mass`."""
    ordered = probabilities.index_select(0, order)
    total = torch.empty(order.numel() + 1, dtype=torch.float64)
    total[0] = 0
    # Converted first: summing float32 into float64 falls back to a loop that is eight times slower.
    torch.cumsum(ordered.double(), dim=0, out=total[1:])
    return ordered, total
