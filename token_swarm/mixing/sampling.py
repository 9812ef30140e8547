"""Choosing the next symbol: greedy, drawn with one uniform a symbol (seeded), or following a script."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 64


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
