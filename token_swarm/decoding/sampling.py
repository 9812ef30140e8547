"""Choosing the next symbol from a law."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Sampler:
    """Greedy, or one uniform per symbol through the inverse cumulative distribution (seeded, reproducible)."""

    def __init__(self, *, greedy: bool, seed: int) -> None:
        self._greedy = greedy
        self._random = np.random.default_rng(seed)

    def choose(self, law: npt.NDArray[Any]) -> int:
        """Index of the chosen symbol. law: [symbols], non-negative, not all zero. Ties go to the first."""
        if self._greedy:
            return int(np.argmax(law))
        return inverse_cdf(law, float(self._random.random()))


def inverse_cdf(law: npt.NDArray[Any], uniform: float) -> int:
    """The symbol at which the cumulative law passes `uniform` in [0, 1); never one of probability 0.

    Summed in float64 and scaled by the sum itself, so that a law that adds up to 1 - 1e-7 loses nothing.
    """
    cumulative = np.cumsum(law, dtype=np.float64)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # Rounding can put uniform * total at the total itself: the last symbol with any mass is meant.
    return index if index < law.size and law[index] > 0 else int(np.flatnonzero(law)[-1])
