"""Racing: with an expensive utility, only the promising particles of a batch are judged on all examples.

Every particle sees the same few examples, the better half sees more of them, and so on (successive halving, Jamieson
and Talwalkar 2016). Who drops out is compared with the winner on the examples that both saw.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.run.subset import evaluate
from token_swarm.search.utility import Array, Evaluator, Utility

RUNGS = (25, 50, 100)
"""Examples after which half of the particles drop out; those that are left are judged on all."""


@dataclass(frozen=True)
class Judged:
    """utilities: [particles], NaN where it failed; examples: judged in all; failures: particle -> reason."""

    utilities: Array
    examples: int
    failures: dict[int, str]


def judge(evaluator: Evaluator, utility: Utility, mixtures: Sequence[Mixture]) -> Judged:
    """Every mixture on every example."""
    scores = evaluate(evaluator, utility, mixtures)
    return Judged(scores.utility(), len(mixtures) * utility.items, _reasons(scores, range(len(mixtures))))


class Race:
    """Judges batches by racing. An expensive utility keeps what it generated: no example is judged twice."""

    def __init__(self, rungs: Sequence[int], items: int, seed: int) -> None:
        """rungs: numbers of examples, growing; those that are no fewer than `items` do nothing. Raises BadParameter."""
        if any(isinstance(rung, bool) or not isinstance(rung, int) or rung < 1 for rung in rungs):
            raise BadParameter("race", list(rungs), "whole numbers of at least 1")
        if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise BadParameter("race", list(rungs), "growing numbers of examples")
        self._rungs = [rung for rung in rungs if rung < items]
        # One order for the whole search: common examples make particles of different iterations comparable too.
        self._order = np.random.default_rng([seed, 5]).permutation(items)

    def judge(self, evaluator: Evaluator, utility: Utility, mixtures: Sequence[Mixture]) -> Judged:
        """As `judge`, but a particle that drops out gets an estimate.

        It is the winner's utility on all examples, less what the particle was behind on those that both saw; so it is
        below the winner's, and the best of a search was always judged on all examples.
        """
        alive: npt.NDArray[np.intp] = np.arange(len(mixtures))
        utilities = np.full(len(mixtures), np.nan)
        failures: dict[int, str] = {}
        left: list[
            tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Array]
        ] = []  # who dropped, who raced, their scores
        examples = seen = 0
        for rung in [*self._rungs, utility.items]:
            chosen = None if rung == utility.items else np.sort(self._order[:rung]).tolist()
            scores = evaluate(evaluator, utility, [mixtures[i] for i in alive], chosen)
            values = scores.utility()
            examples += len(alive) * (rung - seen)
            seen = rung
            failures |= _reasons(scores, alive.tolist())
            standing = ~np.isnan(values)
            if chosen is None or not standing.any():
                utilities[alive] = values
                break
            # Half of them goes on, and who is as good as the last of that half.
            last = -np.sort(-values[standing])[(standing.sum() + 1) // 2 - 1]
            staying = standing & (values >= last)
            left.append((alive[standing & ~staying], alive, values))
            alive = alive[staying]
        if np.isnan(utilities).all():
            return Judged(utilities, examples, failures)
        winner = int(np.nanargmax(utilities))
        for dropped, raced, values in left:
            rung_of = dict(zip(raced.tolist(), values.tolist(), strict=True))
            for particle in dropped.tolist():
                utilities[particle] = utilities[winner] + (rung_of[particle] - rung_of[winner])
        return Judged(utilities, examples, failures)


def _reasons(scores: object, particles: Sequence[int]) -> dict[int, str]:
    reasons: Sequence[str | None] = getattr(scores, "failures", ())
    return {particle: reason for particle, reason in zip(particles, reasons, strict=False) if reason is not None}
