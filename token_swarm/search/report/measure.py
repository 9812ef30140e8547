"""How a utility is shown to people: a likelihood as bits per byte, an accuracy as a percentage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from token_swarm.search.report.statistics import Interval
from token_swarm.search.utilities.registry import UTILITIES, utility_kind


@dataclass(frozen=True)
class Measure:
    """A linear scale: shown = scale x utility. digits: after the point."""

    label: str
    scale: float
    digits: int
    higher_is_better: bool

    @classmethod
    def of(cls, utility: str) -> Measure:
        """The scale for the utility of that name."""
        if utility == "loglikelihood":
            return cls("bits per byte", -1 / math.log(2), 4, higher_is_better=False)
        if utility in UTILITIES.names() and utility_kind(utility).percent:
            return cls("accuracy, %", 100.0, 1, higher_is_better=True)
        return cls(utility, 1.0, 4, higher_is_better=True)

    def show(self, utility: float) -> float:
        """The number to show."""
        return self.scale * utility

    def text(self, utility: float, *, signed: bool = False) -> str:
        """The number in digits."""
        return f"{self.show(utility):{'+' if signed else ''}.{self.digits}f}"

    def bounds(self, interval: Interval) -> tuple[float, float]:
        """The interval's (lower, upper) on this scale."""
        ends = sorted((self.show(interval.low), self.show(interval.high)))
        return ends[0], ends[1]

    def span(self, interval: Interval, *, signed: bool = False) -> str:
        """The interval in digits: "1.0312 to 1.0977"."""
        if not any(map(math.isfinite, (interval.low, interval.high))):
            return "no bounds"
        sign = "+" if signed else ""
        return " to ".join(f"{bound:{sign}.{self.digits}f}" for bound in self.bounds(interval))
