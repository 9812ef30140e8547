"""Inputs that every implementation of the kernels is held against the reference on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MixCase:
    """Arguments of `mix`, without the rule."""

    name: str
    logits: tuple[Tensor, ...]
    weights: Tensor
    temperatures: Tensor
    allowed: Tensor


def random_case(
    name: str, *, rows: int, width: int, experts: int, dtype: torch.dtype, seed: int, scale: float = 4.0
) -> MixCase:
    """Random logits, weights that differ by row, an unruly mask."""
    random = torch.Generator().manual_seed(seed)
    logits = tuple((torch.randn(rows, width, generator=random) * scale).to(dtype) for _ in range(experts))
    weights = torch.rand(rows, experts, generator=random, dtype=torch.float64) + 0.05
    temperatures = 0.5 + torch.rand(rows, experts, generator=random, dtype=torch.float64)
    allowed = torch.rand(width, generator=random) > 0.1
    allowed[width // 2] = True
    return MixCase(name, logits, weights, temperatures, allowed)


def with_signs(case: MixCase) -> MixCase:
    """The same with every second weight negative: for the log-linear rule."""
    signs = torch.ones_like(case.weights)
    signs[:, 1::2] = -1
    return MixCase(case.name + ", signed", case.logits, case.weights * signs, case.temperatures, case.allowed)


def adversarial_cases() -> list[MixCase]:
    """Rows that break careless kernels; float32, three experts, 37 tokens."""
    base = random_case("base", rows=6, width=37, experts=3, dtype=torch.float32, seed=5)
    free = torch.ones(37, dtype=torch.bool)

    def changed(name: str, change: object, allowed: Tensor = free, weights: Tensor | None = None) -> MixCase:
        logits = tuple(table.clone() for table in base.logits)
        change(logits)  # type: ignore[operator]
        return MixCase(name, logits, base.weights if weights is None else weights, base.temperatures, allowed)

    def put(expert: int, row: int, where: object, value: float) -> object:
        return lambda logits: logits[expert][row].__setitem__(where, value)

    def all_of(*changes: object) -> object:
        return lambda logits: [change(logits) for change in changes]  # type: ignore[operator]

    unasked = base.weights.clone()
    unasked[2, 1] = 0
    unasked[4] = 0
    padded = free.clone()
    padded[-5:] = False
    one = torch.zeros(37, dtype=torch.bool)
    one[11] = True
    return [
        changed("all equal", lambda logits: [table.fill_(1.0) for table in logits]),
        changed("ties at the top", put(0, 1, slice(3, 9), 50.0)),
        changed("minus infinity at one expert", put(1, 0, slice(0, 20), -math.inf)),
        changed(
            "minus infinity everywhere but at one token",
            lambda logits: [table[2].fill_(-math.inf)[7:8].fill_(3.0) for table in logits],
        ),
        changed(
            "experts that exclude each other",
            all_of(put(0, 1, slice(0, 18), -math.inf), put(1, 1, slice(18, 37), -math.inf)),
        ),
        changed("nothing left at one expert", put(1, 3, slice(None), -math.inf)),
        changed("NaN", put(2, 1, 4, math.nan)),
        changed("plus infinity", put(0, 5, 36, math.inf)),
        changed("plus infinity beside minus infinity", all_of(put(0, 5, 36, math.inf), put(1, 5, 36, -math.inf))),
        changed("NaN at an expert that is not asked", put(1, 2, slice(None), math.nan), weights=unasked),
        changed("garbage in the padding", all_of(put(0, 0, slice(32, 37), math.nan), put(1, 1, 36, math.inf)), padded),
        changed("one token allowed", lambda logits: None, one),
        changed("huge range", lambda logits: [table.mul_(2000.0) for table in logits]),
        changed("large offset", lambda logits: [table.add_(1000.0) for table in logits]),
        changed("one-hot", lambda logits: [table[0].fill_(-300.0)[9:10].fill_(300.0) for table in logits]),
    ]


def assert_probabilities(ours: Tensor, reference: Tensor, *, relative: float = 1e-5) -> None:
    """Bad rows are the same ones, the others agree to `relative` (below 1e-30 float32 has no digits left)."""
    assert ours.dtype == torch.float32
    assert ours.shape == reference.shape
    assert bool((ours.isnan() == reference.isnan()).all())
    good = ~reference.isnan()
    difference = (ours.double() - reference)[good].abs()
    assert bool((difference <= relative * reference[good] + 1e-30).all()), float(
        (difference / (reference[good] + 1e-30)).max()
    )
