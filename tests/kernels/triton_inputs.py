"""What the laws of the Triton kernels share: inputs that are hard, the tile's size, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import MixCase, adversarial_cases
from token_swarm.kernels import reference, triton
from token_swarm.kernels.triton import launch
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule
from token_swarm.vocabulary import Vocabulary

SMALLEST_NORMAL = 2.0**-126
"""Below it float32 has fewer digits, and a GPU may round to 0."""


def assert_same(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """The same rows are bad, and every probability is within `relative` of the definition's."""
    ours = ours.cpu().double()
    assert ours.shape == expected.shape
    assert torch.equal(ours.isnan(), expected.isnan())
    good = ~expected.isnan()
    error = (ours - expected)[good].abs() - SMALLEST_NORMAL
    assert bool((error <= relative * expected[good].abs()).all()), f"{float((error / expected[good].abs()).max())}"


def on(device: str, values: Any) -> Any:
    """The tensors among `values` on `device`."""
    if isinstance(values, Tensor):
        return values.to(device)
    return type(values)(on(device, value) for value in values) if isinstance(values, list | tuple) else values


def mix_on(device: str, case: MixCase, rule: Rule) -> Tensor:
    moved = on(device, (case.logits, case.weights, case.temperatures, case.allowed))
    return triton.mix(moved[0], moved[1], moved[2], rule, moved[3])


def expected_mix(case: MixCase, rule: Rule) -> Tensor:
    return reference.mix(case.logits, case.weights, case.temperatures, rule, case.allowed)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the tile's size, so that a short row has several tiles."""
    return lambda size: monkeypatch.setattr(launch, "BLOCK", size)


def adversarial_rows() -> list[MixCase]:
    """The adversarial cases, every row once: most cases change one row of the same six."""
    seen: set[tuple[bytes, ...]] = set()
    kept = []
    for case in adversarial_cases():
        parts = (*case.logits, case.weights, case.temperatures)
        keys = [(*(bits(part[row]) for part in parts), bits(case.allowed)) for row in range(len(case.weights))]
        new = [row for row, key in enumerate(keys) if key not in seen]
        seen.update(keys)
        logits = tuple(table[new] for table in case.logits)
        kept.append(MixCase(case.name, logits, case.weights[new], case.temperatures[new], case.allowed))
    return kept


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def three_vocabularies() -> UnionMap:
    """Overlapping vocabularies with twins of different number, ids that take no part, and two ends of the text."""

    def table(low: int, twins: int) -> tuple[bytes | None, ...]:
        own = [b"%d" % token for token in range(low, low + 60)]
        return (None, *own, *([b"%d" % (low + 7)] * twins), None, None)

    tables = [table(0, 0), table(10, 3), table(45, 1)]
    return UnionMap.build([Vocabulary(own, (0, len(own) - 1)) for own in tables])


def union_case(dtype: torch.dtype, rule: Rule) -> tuple[list[Tensor], Tensor, Tensor, UnionMap]:
    union = three_vocabularies()
    generator = torch.Generator().manual_seed(4)
    logits = [(4 * torch.randn(5, 70, generator=generator)).to(dtype) for _ in range(3)]
    weights = 0.1 + torch.rand(5, 3, generator=generator, dtype=torch.float64)
    if rule is Rule.LOG_LINEAR:
        weights[:, 1] *= -0.5
    weights[1, 2] = 0
    weights[4] = 0
    # What takes no part is never looked at, nor is an expert of weight 0.
    logits[0][:, 61] = math.nan
    logits[2][:, 69] = math.inf
    logits[2][1] = math.nan
    logits[0][0, 5:9] = -math.inf
    logits[1][2, 3] = math.nan
    logits[1][3, 62] = math.inf
    return logits, weights, 0.5 + torch.rand(5, 3, generator=generator, dtype=torch.float64), union


def tied_rows() -> Tensor:
    """float32 [6, 150]: random, equal, one-hot, ties at every threshold (sums without rounding), nearly equal, bad."""
    rows = torch.zeros(6, 150)
    generator = torch.Generator().manual_seed(6)
    rows[0] = torch.softmax(2 * torch.randn(150, generator=generator), -1)
    rows[1] = 1 / 128
    rows[2, 77] = 1.0
    rows[3, 20:28] = 1 / 16
    rows[3, 60:76] = 1 / 32
    rows[4] = torch.softmax(0.01 * torch.randn(150, generator=generator), -1)
    rows[5] = math.nan
    return rows


# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.2),
    (1.0, 10, 1.0, 0.0),
    (1.0, 0, 0.5, 0.0),
    (0.7, 0, 0.97, 0.0),
    (1.3, 12, 0.8, 0.05),
    (2.0, 150, 0.999, 0.3),
    (0.1, 5, 0.2, 0.0),
    (1.0, 149, 0.0, 1.0),
]


def settings(device: str, which: tuple[float, int, float, float], rows: int) -> list[Tensor]:
    return [
        torch.full((rows,), which[0], dtype=torch.float64, device=device),
        torch.full((rows,), which[1], dtype=torch.int64, device=device),
        torch.full((rows,), which[2], dtype=torch.float64, device=device),
        torch.full((rows,), which[3], dtype=torch.float64, device=device),
    ]


def scored(particles: int, symbols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(laws, targets, weights, offsets): excluded symbols and targets, weights of 0, an empty item, one of 2 chunks."""
    generator = torch.Generator().manual_seed(symbols)
    positions = 22 if symbols == 70 else 5
    laws = torch.log_softmax(15 * torch.randn(positions, 3, symbols, generator=generator), -1)
    laws[0, 1, 1:4] = -math.inf
    laws[1, 2, 2] = -math.inf
    targets = torch.randint(4, symbols, (positions,), generator=generator)
    targets[1] = 2
    weights = 3 * torch.randn(particles, 3, generator=generator, dtype=torch.float64)
    weights[-2:-1] = 0
    weights[-1, 2] = 0
    return laws, targets, weights, torch.tensor([0, 1, 3, 3, positions])
