"""Sampling: its settings, and the choice of the next symbol by them.

A symbol is the most probable one, drawn with one uniform (seeded), or the next one of a script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from token_swarm import kernels, ranges

_BLOCK = 64
_WIDE_BELOW = 0.25
"""Below this temperature a token of e^-22 times the largest probability would be 0 in float32."""
_WIDE_ABOVE = 4.0
"""Above it a token that is e^-87 times as probable as the largest, 0 in float32, would count: e^-22 of it at 4."""


@dataclass(frozen=True)
class Sampling:
    """How a token distribution is reshaped, in this order: temperature, min-p, top-k, top-p.

    A temperature below `ranges.GREEDY_BELOW` means greedy: the choice is the most probable one and the distribution
    itself is left alone.
    top_k 0 and top_p 1 and min_p 0 switch a filter off. Tokens that tie with the last one kept are kept.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        ranges.TEMPERATURE.require(self.temperature, "temperature")
        ranges.TOP_K.require(self.top_k, "top_k")
        ranges.TOP_P.require(self.top_p, "top_p")
        ranges.MIN_P.require(self.min_p, "min_p")

    @property
    def greedy(self) -> bool:
        """Whether the most probable symbol is taken instead of a drawn one."""
        return self.temperature < ranges.GREEDY_BELOW

    @property
    def changes_law(self) -> bool:
        """Whether `apply` would return anything but its argument."""
        return not self.greedy and (self.temperature, self.top_k, self.top_p, self.min_p) != (
            1.0,
            0,
            1.0,
            0.0,
        )

    @property
    def is_wide(self) -> bool:
        """Whether the distribution has to be float64: float32 has too small a range at this temperature."""
        return self.changes_law and not _WIDE_BELOW <= self.temperature <= _WIDE_ABOVE

    def apply(self, probabilities: Tensor) -> Tensor:
        """probabilities: [width], summing to 1. Returns a reshaped copy that sums to 1."""
        if not self.changes_law:
            return probabilities
        return kernels.shape(
            probabilities[None],
            torch.tensor([self.temperature], dtype=torch.float64),
            torch.tensor([self.top_k]),
            torch.tensor([self.top_p], dtype=torch.float64),
            torch.tensor([self.min_p], dtype=torch.float64),
        )[0]


class Sampler:
    """Where a text's choices come from. `script`: bytes to follow instead of choosing."""

    def __init__(self, *, greedy: bool, seed: int, script: bytes | None = None) -> None:
        self.greedy = greedy
        self._random = np.random.default_rng(seed)
        self._uniforms = np.empty(0)
        self._script = script

    def uniforms(self, count: int) -> npt.NDArray[np.float64] | None:
        """The next `count` uniforms in [0, 1), float64; None when nothing is drawn. They stay next until `consume`."""
        if self.greedy or self._script is not None:
            return None
        while self._uniforms.size < count:
            self._uniforms = np.concatenate([self._uniforms, self._random.random(_BLOCK)])
        return self._uniforms[:count]

    @property
    def script(self) -> bytes | None:
        """What is left of the script; None without one."""
        return self._script

    def consume(self, symbols: int) -> None:
        """So many symbols have been chosen."""
        if self._script is not None:
            self._script = self._script[symbols:]
        elif not self.greedy:
            self._uniforms = self._uniforms[symbols:]

    def choose(self, law: npt.NDArray[Any]) -> int:
        """Index of the next symbol, which is consumed. law: [symbols], non-negative, not all zero."""
        uniforms = self.uniforms(1)
        if self._script is not None:
            symbol = self._script[0]
        else:
            # The first of ties.
            symbol = int(np.argmax(law)) if uniforms is None else inverse_cdf(law, float(uniforms[0]))
        self.consume(1)
        return symbol


def inverse_cdf(law: npt.NDArray[Any], uniform: float) -> int:
    """The symbol at which the cumulative law passes `uniform` in [0, 1); never one of probability 0.

    Summed in float64 and scaled by the sum itself, so that a law that adds up to 1 - 1e-7 loses nothing.
    """
    cumulative = np.cumsum(law, dtype=np.float64)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # Rounding can put uniform * total at the total itself: the last symbol with any mass is meant.
    return index if index < law.size and law[index] > 0 else int(np.flatnonzero(law)[-1])
