"""The end of a search on a smooth utility: Newton steps from measured derivatives, every batch a few particles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from token_swarm.search.optimisers.base import Best, State, put, taken
from token_swarm.search.optimisers.quadratic import best_step, negative_definite
from token_swarm.search.optimisers.space import Space
from token_swarm.search.utility import Array

SPACINGS = {1e-2: 1e-6, 1e-3: 1e-9, 1e-4: 1e-12}
"""Distances of the differences, and the gain of a round below which the next distance has more to give.

Wide ones survive a utility that is rounded to 1e-9; close ones say where the top is to 1e-12.
"""
DAMPINGS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e3)
"""Levenberg-Marquardt dampings, relative to the greatest curvature: all are tried, the best is taken."""


class Polish:
    """Climbs from a position to the top of the smooth hill it stands on, by asking only for utilities.

    A round is two batches: differences around the centre give gradient and Hessian, then the maximisers of the
    quadratic model under several dampings are measured and the best becomes the centre. Steps obey the bounds of
    the space, so an expert that does not help ends at weight 0 exactly. The centre only ever gets better.
    """

    def __init__(self, space: Space, start: Best, rounds: int) -> None:
        """Begins at `start`; at most `rounds` rounds."""
        self._space = space
        self.centre = start.position.copy()
        self.utility = start.utility
        self._rounds = rounds
        self._spacing = 0
        self._candidates: Array | None = None
        self._done = rounds <= 0 or not np.isfinite(start.utility) or not len(self._axes())

    @property
    def done(self) -> bool:
        """Whether no spacing gains any more, or the rounds are used up."""
        return self._done

    def ask(self) -> Array:
        """[n, dimension]: the differences around the centre, or the candidates of a step."""
        if self._candidates is not None:
            return self._candidates.copy()
        return self._design()[0]

    def tell(self, utilities: Array) -> None:
        """utilities: [n] of what was asked, -inf for a particle that failed."""
        if self._candidates is None:
            self._plan(utilities)
        else:
            self._settle(self._candidates, utilities)

    def _axes(self) -> npt.NDArray[np.intp]:
        """Coordinates that are varied: on the simplex all but the greatest weight, which takes up the difference."""
        axes = np.arange(self._space.dimension)
        return np.asarray(axes[axes != self._pivot()])

    def _pivot(self) -> int:
        return int(np.argmax(self.centre[: len(self._space.experts)])) if self._space.on_simplex else -1

    def _design(self) -> tuple[Array, Array]:
        """The points of the differences, [n, dimension], and how far each axis is moved: [axes, 2].

        A pair of points an axis: on both sides, or, at a bound, both on the inner side. Then one for each two axes.
        """
        axes, pivot = self._axes(), self._pivot()
        # The greatest weight of E is at least 1/E: it can give two steps away.
        h = min(list(SPACINGS)[self._spacing], 0.25 / len(self._space.experts))
        below = (self.centre - self._space.lower)[axes]
        above = (self._space.upper - self.centre)[axes]
        steps = np.where(below[:, None] < h, [h, 2 * h], np.where(above[:, None] < h, [-h, -2 * h], [h, -h]))
        moves = [(axis, step) for axis, pair in zip(axes, steps, strict=True) for step in pair]
        offsets = np.zeros((len(moves) + len(axes) * (len(axes) - 1) // 2, self._space.dimension))
        for row, (axis, step) in enumerate(moves):
            offsets[row, axis] = step
        row = len(moves)
        for i in range(len(axes)):
            for j in range(i):
                offsets[row, axes[i]], offsets[row, axes[j]] = steps[i, 0], steps[j, 0]
                row += 1
        if pivot >= 0:
            offsets[:, pivot] = -offsets[:, : len(self._space.experts)].sum(axis=1)
        return self.centre + offsets, steps

    def _plan(self, utilities: Array) -> None:
        """Fit the quadratic model and make the candidates.

        An axis with a point that failed is left alone in this round: the model is flat there.
        """
        steps = self._design()[1]
        count = len(steps)
        first, second = steps[:, 0], steps[:, 1]
        at_first, at_second = utilities[0 : 2 * count : 2], utilities[1 : 2 * count : 2]
        known = np.isfinite(at_first) & np.isfinite(at_second)
        if not known.any():
            self._next_spacing()
            return
        # The parabola through the centre and both points of an axis.
        rise_first = np.where(known, at_first - self.utility, 0.0) / first
        rise_second = np.where(known, at_second - self.utility, 0.0) / second
        curvature = 2 * (rise_first - rise_second) / (first - second)
        slope = rise_first - curvature * first / 2
        hessian = np.diag(curvature)
        row = 2 * count
        for i in range(count):
            for j in range(i):
                if known[i] and known[j] and np.isfinite(utilities[row]):
                    both = utilities[row] - at_first[i] - at_first[j] + self.utility
                    hessian[i, j] = hessian[j, i] = both / (first[i] * first[j])
                row += 1
        self._candidates = self._steps_of(slope, hessian)

    def _steps_of(self, slope: Array, hessian: Array) -> Array:
        """The model's maximisers under every damping: [dampings, dimension]."""
        axes, space = self._axes(), self._space
        gradient, bending = np.zeros(space.dimension), np.zeros((space.dimension, space.dimension))
        gradient[axes], bending[np.ix_(axes, axes)] = slope, hessian
        scale = max(float(np.abs(bending).max()), 1e-9)
        below, above = self.centre - space.lower, space.upper - self.centre
        fixed = len(space.experts) if space.on_simplex else 0
        steps = [
            best_step(gradient, negative_definite(bending, max(damping, 1e-9) * scale), below, above, fixed)
            for damping in DAMPINGS
        ]
        return space.project(self.centre + np.stack(steps))

    def _settle(self, candidates: Array, utilities: Array) -> None:
        """Move to the best candidate if it is better than the centre."""
        self._candidates = None
        leader = int(np.argmax(utilities))
        gain = float(utilities[leader]) - self.utility
        if gain > 0:
            self.centre, self.utility = candidates[leader].copy(), float(utilities[leader])
        self._rounds -= 1
        if self._rounds <= 0:
            self._done = True
        elif not gain > list(SPACINGS.values())[self._spacing]:
            self._next_spacing()

    def _next_spacing(self) -> None:
        self._spacing += 1
        self._done = self._spacing >= len(SPACINGS)

    def state(self) -> State:
        """Everything that `restore` needs."""
        return taken(self, _FIELDS)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up where `state` was made."""
        put(self, _FIELDS, state)


_FIELDS = ("centre", "utility", "_rounds", "_spacing", "_candidates", "_done")
