"""Means, percentiles and ratios of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Of many values: what vLLM's serving benchmark prints."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Summary | None:
        """None when there are no values. scale: 1000 for milliseconds from seconds."""
        if not values:
            return None
        scaled = np.asarray(values) * scale
        return cls(float(scaled.mean()), float(np.median(scaled)), float(np.percentile(scaled, 99)))


@dataclass(frozen=True)
class Spread:
    """A figure over interleaved rounds: its median, and the lowest and highest round."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError when there are no values."""
        if not values:
            raise ValueError("rounds: 0 were measured, at least 1 is needed")
        return cls(float(np.median(values)), float(min(values)), float(max(values)), len(values))

    @classmethod
    def of_ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Each round's own ratio: what drifts from round to round cancels. Raises ValueError for unequal lengths."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def __str__(self) -> str:
        """`1.07 [1.05, 1.10]`."""
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)
