"""Where the time between an expert's logits and the next bytes goes."""

from __future__ import annotations

import enum
import time


class Part(enum.Enum):
    """What is timed."""

    MIX = "mix"
    """Logits to token laws: temperatures, softmax, the mixture inside a group, filters."""
    PREFIX_MASS = "prefix_mass"
    """Token laws to cumulative masses in the order of their bytes; for an expert that is mixed with no other of its
    vocabulary, from its logits."""
    WALK = "walk"
    """Mixing across groups, sampling, appending."""


class Measurement:
    """What a `measure` counts. A class: to enter a generator's context takes longer than some of what is timed."""

    __slots__ = ("_part", "_seconds", "_started")

    def __init__(self, seconds: dict[Part, float], part: Part) -> None:
        self._seconds = seconds
        self._part = part

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._part] += time.perf_counter() - self._started


class Stopwatch:
    """Adds up seconds by part. It is read a few times a token, which takes some microseconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Part, 0.0)

    def measure(self, part: Part) -> Measurement:
        """Count what runs inside of the context. Not for use inside of itself."""
        return Measurement(self.seconds, part)

    def add(self, other: Stopwatch) -> None:
        """Count what another one has counted as well."""
        for part, seconds in other.seconds.items():
            self.seconds[part] += seconds

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())
