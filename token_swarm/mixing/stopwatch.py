"""Where the time between an expert's logits and the next bytes goes."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Part(enum.Enum):
    """What is timed."""

    MIX = "mix"
    """Logits to token laws: temperatures, softmax, the mixture inside a group, filters."""
    PREFIX_MASS = "prefix_mass"
    """Token laws to cumulative masses in the order of their bytes."""
    WALK = "walk"
    """Mixing across groups, sampling, appending."""


class Stopwatch:
    """Adds up seconds by part. It is read a few times a token, which takes some microseconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Part, 0.0)

    @contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Count what runs inside. Not for use inside of itself."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())
