"""The kernels' definition, in float64 torch. Every faster version is tested against these functions.

A *bad* row is one where an expert with a weight other than 0 has NaN or +inf at an allowed token, or where no allowed
token is left with any probability. It poisons its own row and no other: probabilities NaN, token -1.
What stands at a token that is not allowed is never looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule

STRIDE = 8
"""A byte law keeps a sum for every so many tokens: with one for each it would write twice as much. As in
csrc/masses.cpp."""


def mix(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    allowed: Tensor,
) -> Tensor:
    """Mix experts over one shared vocabulary into probabilities (DESIGN 3, inside a group).

    logits: one [rows, width] per expert, of any floating dtype; weights, temperatures: [rows, experts], so that
    every row may mix differently; allowed: bool [width].
    linear: sum_e w_e softmax(l_e / T_e) / sum_e w_e; log-linear: softmax(sum_e w_e log_softmax(l_e / T_e)), where
    a token that some expert gives probability 0 stays out whatever the sign of the weight. Any other rule: its own
    `combine`.
    Returns float64 [rows, width]; a row sums to 1 and is 0 where not allowed, or is bad.
    """
    mixed = [
        _mix_row([table[row] for table in logits], weights[row], temperatures[row], rule, allowed)
        for row in range(weights.shape[0])
    ]
    return torch.stack(mixed) if mixed else torch.empty((0, allowed.numel()), dtype=torch.float64)


def _mix_row(logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, allowed: Tensor) -> Tensor:
    asked = [
        (w, torch.where(allowed, row.double(), -torch.inf) / t)
        for row, w, t in zip(logits, weights.tolist(), temperatures.tolist(), strict=True)
        if w != 0
    ]
    bad = torch.full((allowed.numel(),), torch.nan, dtype=torch.float64)
    if not asked or any(not -torch.inf < float(row.max()) < torch.inf for _, row in asked):
        return bad
    return _combine([(w, torch.log_softmax(row, dim=-1)) for w, row in asked], rule, bad)


def _combine(asked: Sequence[tuple[float, Tensor]], rule: Rule, bad: Tensor) -> Tensor:
    """The mixture of log-probabilities under any rule; `bad` when nothing is left."""
    if not rule.has_kernel:
        rows = torch.stack([row for _, row in asked])
        joint = rule.combine(rows, torch.tensor([w for w, _ in asked], dtype=torch.float64, device=rows.device))
        return torch.softmax(joint, dim=-1) if bool((joint > -torch.inf).any()) else bad
    if rule is Rule.LINEAR:
        return torch.stack([w * row.exp() for w, row in asked]).sum(0) / sum(w for w, _ in asked)
    joint = torch.stack([w * row for w, row in asked]).sum(0)
    possible = torch.stack([row for _, row in asked]).isfinite().all(0)
    return torch.softmax(torch.where(possible, joint, -torch.inf), dim=-1) if bool(possible.any()) else bad


def mix_union(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    union: UnionMap,
    floor: float,
) -> Tensor:
    """Mix experts over the union of their vocabularies: tokens are equal when their bytes are (GaC, UniTE).

    logits: one [rows, width of that expert] per expert; weights, temperatures: [rows, experts]. Ids of one expert that
    write the same bytes add up. A token that an expert does not have has probability 0 under the linear rule and
    `floor` (a log-probability) under the log-linear rule, which also raises every smaller one to it.
    Returns float64 [rows, union.size]; a row sums to 1, or is bad.
    """
    mixed = []
    for row in range(weights.shape[0]):
        asked = []
        device = logits[0].device
        bad = torch.full((union.size,), torch.nan, dtype=torch.float64, device=device)
        broken = False
        for expert, (w, t) in enumerate(zip(weights[row].tolist(), temperatures[row].tolist(), strict=True)):
            if w == 0:
                continue
            tokens, ids = (each.to(device) for each in union.pairs(expert))
            own = logits[expert][row].double()[ids] / t
            broken = broken or not -torch.inf < float(own.max()) < torch.inf
            masses = torch.zeros(union.size, dtype=torch.float64, device=device)
            masses.index_add_(0, tokens, torch.softmax(own, dim=-1))
            asked.append((w, masses.log().clamp(min=-torch.inf if rule.normalised else floor)))
        mixed.append(bad if broken or not asked else _combine(asked, rule, bad))
    return torch.stack(mixed)


def shape(probabilities: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Reshape rows of probabilities: temperature, then min-p and top-k, then top-p, each row with its own settings.

    probabilities: [rows, width]; the settings: [rows]. temperature 0 (greedy) leaves the row alone; 1, top_k 0, top_p 1
    and min_p 0 each switch themselves off. Tokens that tie with the last one kept are kept. Rows sum to 1; bad rows
    stay bad.
    """
    shaped = [
        _shape_row(row, *settings)
        for row, *settings in zip(
            probabilities.double(), temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True
        )
    ]
    return torch.stack(shaped)


def _shape_row(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    if temperature == 0 or bool(row.isnan().any()):
        return row
    scaled = (row / row.max()).pow(1 / temperature)
    threshold = min_p
    if 0 < top_k < row.numel():
        threshold = max(threshold, float(scaled.sort(descending=True).values[top_k - 1]))
    scaled = torch.where(scaled >= threshold, scaled, 0.0)
    scaled = scaled / scaled.sum()
    if top_p < 1:
        ranked = scaled.sort(descending=True).values
        last = min(int(torch.searchsorted(ranked.cumsum(0), top_p)), row.numel() - 1)
        scaled = torch.where(scaled >= ranked[last], scaled, 0.0)
        scaled = scaled / scaled.sum()
    return scaled


def choose(probabilities: Tensor, uniforms: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row: the most probable one (the first of ties) or the inverse cumulative distribution at a uniform.

    probabilities: [rows, width]; uniforms: float64 [rows] in [0, 1); greedy: bool [rows]. Returns (tokens int64 [rows],
    log-probabilities float64 [rows]). A token of probability 0 is never chosen; a bad row gives -1 and NaN.
    """
    device = probabilities.device
    tokens = torch.full((probabilities.shape[0],), -1, dtype=torch.int64, device=device)
    log_probs = torch.full((probabilities.shape[0],), torch.nan, dtype=torch.float64, device=device)
    for index, row in enumerate(probabilities.double()):
        if bool(row.isnan().any()):
            continue
        if bool(greedy[index]):
            token = int(row.argmax())
        else:
            cumulative = row.cumsum(0)
            token = int(torch.searchsorted(cumulative, uniforms[index] * cumulative[-1], right=True))
            if token >= row.numel() or row[token] == 0:
                token = int(row.nonzero()[-1])
        tokens[index] = token
        log_probs[index] = (row[token] / row.sum()).log()
    return tokens, log_probs


def prefix_mass(probabilities: Tensor, order: Tensor | int, every: int = 1) -> tuple[Tensor, Tensor]:
    """Probabilities in byte-sorted order, and their cumulative sum.

    probabilities: [rows, width]; order: int64 [tokens] ids sorted by bytes, or the number of tokens where the first ids
    are those. Returns the sorted probabilities [rows, tokens] in their dtype and C, float64 [rows, tokens // every + 1]
    with first entry 0: what comes before tokens 0, every, 2 * every and so on. With every = 1 the mass of the sorted
    interval [lo, hi) is C[hi] - C[lo]. float64 because a float32 sum is off by 15% at mass 1e-6.
    """
    ordered = in_order(probabilities, order)
    total = torch.zeros((ordered.shape[0], ordered.shape[1] + 1), dtype=torch.float64, device=ordered.device)
    torch.cumsum(ordered.double(), dim=1, out=total[:, 1:])
    return ordered, total[:, ::every].contiguous()


def softmax_masses(logits: Tensor, temperatures: Tensor, order: Tensor | int, tokens: int) -> tuple[Tensor, Tensor]:
    """Softmax over some tokens, in an order of one's own: `prefix_mass` of a single expert, from its logits.

    logits: [rows, width]; temperatures: [rows]; order: as `prefix_mass` takes it, of the tokens that take part. Returns
    their probabilities in that order, float64 [rows, count], and C of the first `tokens` of them at every `STRIDE`. A
    bad row is NaN, in C from its second entry on.
    """
    picked = in_order(logits, order).double() / temperatures[:, None]
    ordered = torch.where(picked.amax(1, keepdim=True).isfinite(), torch.softmax(picked, 1), torch.nan)
    return ordered, prefix_mass(ordered, tokens, STRIDE)[1]


def in_order(table: Tensor, order: Tensor | int) -> Tensor:
    """The columns of `table` [rows, width] in an order, as `prefix_mass` takes it."""
    return table[:, :order] if isinstance(order, int) else table[:, order]


def score_linear(masses: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Log-likelihood of items under many linear particles, from cached masses.

    masses: [experts, positions], what each expert gave the symbol that was there; weights: [particles, experts], not
    negative; offsets: int64 [items + 1], item i is positions offsets[i] to offsets[i + 1].
    Returns float64 [particles, items]: sum over the item's positions of log(sum_e w_e m_e), -inf where a mixture is 0.
    """
    logs = (weights.double() @ masses.double()).log()  # [particles, positions]
    return _by_item(logs, offsets)


def score_log_linear(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Log-likelihood of items under many log-linear particles, from cached laws.

    log_probs: [positions, experts, symbols], each a log-law, -inf where 0; targets: int64 [positions], the symbol that
    was there; weights: [particles, experts], of any sign; offsets as in `score_linear`.
    Returns float64 [particles, items]: sum over the item's positions of j[target] - logsumexp(j) with
    j = sum_e w_e log_probs[e]; a symbol that an expert with a weight other than 0 excludes is excluded.
    """
    scores = torch.zeros((weights.shape[0], targets.numel()), dtype=torch.float64, device=log_probs.device)
    rows = torch.arange(targets.numel(), device=log_probs.device)
    for particle, own in enumerate(weights.double()):
        used = own.nonzero()[:, 0]
        joint = (log_probs[:, used].double() * own[used, None]).sum(1)
        joint = torch.where(log_probs[:, used].isfinite().all(1), joint, -torch.inf)
        scores[particle] = joint[rows, targets] - joint.logsumexp(1)
    return _by_item(scores, offsets)


def score_combined(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor, rule: Rule) -> Tensor:
    """As `score_log_linear`, under any rule."""
    scores = torch.zeros((weights.shape[0], targets.numel()), dtype=torch.float64, device=log_probs.device)
    rows = torch.arange(targets.numel(), device=log_probs.device)
    for particle, own in enumerate(weights.double()):
        used = own.nonzero()[:, 0]
        joint = rule.combine(log_probs[:, used].movedim(1, 0), own[used])
        scores[particle] = joint[rows, targets] - joint.logsumexp(1)
    return _by_item(scores, offsets)


def _by_item(scores: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    pieces = [scores[:, low:high].sum(1) for low, high in itertools.pairwise(bounds)]
    return torch.stack(pieces, dim=1) if pieces else torch.zeros((scores.shape[0], 0), dtype=torch.float64)
