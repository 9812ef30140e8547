"""Temperature, min-p, top-k and top-p on a group's token distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from token_swarm import kernels, ranges

_WIDE_BELOW = 0.25
"""Below this temperature a token of e^-22 times the largest probability would be 0 in float32."""


@dataclass(frozen=True)
class Shaping:
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

    def apply(self, probabilities: Tensor, *, wide: bool = False) -> Tensor:
        """probabilities: [width], summing to 1. Returns a reshaped copy that sums to 1.

        wide: the result is to be multiplied with others, and is float64 where float32 would turn what is unlikely into
        0 at this temperature.
        """
        if not self.changes_law:
            return probabilities
        if wide and self.temperature < _WIDE_BELOW:
            probabilities = probabilities.double()
        return kernels.shape(
            probabilities[None],
            torch.tensor([self.temperature], dtype=torch.float64),
            torch.tensor([self.top_k]),
            torch.tensor([self.top_p], dtype=torch.float64),
            torch.tensor([self.min_p], dtype=torch.float64),
        )[0]
