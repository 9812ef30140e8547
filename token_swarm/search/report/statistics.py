"""How sure a score is, and whether one mixture is better than another: resampling over the examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from token_swarm.search.utility import Array, Scores

RESAMPLES = 10_000
_CHUNK = 500  # resamples at a time: 500 x 10,000 examples x 8 bytes are 40 MB


@dataclass(frozen=True)
class Interval:
    """A score with the bounds of its central confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """By how much one mixture is better than another on the same examples, and how likely that is chance.

    difference: its utility minus the other's; p_value: of a two-sided paired test; wins, losses: examples on which it
    is better, worse. The interval holds the differences that the same test does not reject, so that it excludes 0
    exactly where p_value is below 1 - level: a headline and the interval beside it cannot contradict each other, as
    they did while one came of a permutation test and the other of a bootstrap. level: of the interval.
    """

    difference: Interval
    p_value: float
    wins: int
    losses: int
    level: float = 0.95

    @property
    def significant(self) -> bool:
        """Whether the test rejects that there is no difference; then the interval excludes 0."""
        return self.p_value < _alpha(self.level)


class Resampling:
    """Scores, and their utilities on examples that were drawn with replacement, their weights with them.

    Equal seeds give equal results. A utility that is no plain mean is resampled a fifth as often: it is slower.
    """

    def __init__(self, scores: Scores, *, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> None:
        """level: of the intervals."""
        self._scores, self._level, self._seed = scores, level, seed
        self._count = resamples if type(scores) is Scores else max(resamples // 5, 1)
        self._utilities = scores.utility()
        self._drawn = _resampled(scores, seed, self._count)  # [resamples, mixtures]

    def interval(self, mixture: int) -> Interval:
        """Percentile bootstrap interval of a mixture's utility (Efron and Tibshirani 1993, section 13.3)."""
        return Interval(float(self._utilities[mixture]), *_percentiles(self._drawn[:, mixture], self._level))

    def compare(self, one: int, other: int) -> Comparison:
        """Mixture `one` against mixture `other`, by one test that gives p-value and interval.

        For a plain mean it is the paired permutation test, which swaps the two on each example with probability 1/2
        (Good 2005, section 3.7), and its inversion (see `_shifts`); the observed one counts among the swaps, so that
        p is never 0. A mean that is not plain cannot be shifted example by example: there it is the paired bootstrap,
        p being twice the smaller share of resamples on one side of 0.
        """
        pair = replace(self._scores, values=self._scores.values[[one, other]], failures=())
        observed = float(_minus(self._utilities[one], self._utilities[other]))
        gaps = _minus(pair.values[0], pair.values[1])
        if type(pair) is Scores:
            low, high = _shifts(gaps, pair.weights, self._seed, self._count)
        else:
            between = np.sort(_minus(self._drawn[:, one], self._drawn[:, other]))
            low, high = between, between
        # Half of a bootstrap's p-value is on either side; a permutation test counts both sides at once.
        sides = 1 if type(pair) is Scores else 2
        as_far = min(int((low <= 0).sum()), int((high >= 0).sum()))
        rank = math.ceil(_alpha(self._level) / sides * (1 + self._count) - 1e-9) - 1
        bounds = (-math.inf, math.inf)
        if rank >= 1:
            bounds = float(np.sort(low)[rank - 1]), float(np.sort(high)[-rank])
        return Comparison(
            difference=Interval(observed, *bounds),
            p_value=min(1.0, sides * (1 + as_far) / (1 + self._count)),
            wins=int((gaps > 0).sum()),
            losses=int((gaps < 0).sum()),
            level=self._level,
        )


def _resampled(scores: Scores, seed: int, resamples: int) -> Array:
    """Utilities on examples that were drawn with replacement: [resamples, mixtures]."""
    random = np.random.default_rng([seed, 6])
    items = len(scores.weights)
    drawn = np.empty((resamples, len(scores.values)))
    if type(scores) is not Scores:
        for row in range(resamples):
            drawn[row] = scores.take(random.integers(items, size=items)).utility()
        return drawn
    values, impossible = _split(scores.values)
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        counts = random.multinomial(items, np.full(items, 1 / items), size=stop - start)
        drawn[start:stop] = (counts @ values.T) / (counts @ scores.weights)[:, None]
        drawn[start:stop][counts @ impossible.T > 0] = -np.inf
    return drawn


def _shifts(gaps: Array, weights: Array, seed: int, resamples: int) -> tuple[Array, Array]:
    """(low, high), [resamples] each: between them, a random swap is as far off as what was observed.

    With d taken off each example, a swap of signs s is as far off where |A_s - d B_s| >= |A - d B|, A and B being the
    sums of gaps and weights and A_s, B_s those with signs. As |B_s| <= B, that is so between (A - A_s) / (B - B_s) and
    (A + A_s) / (B + B_s): the means of the examples that s swaps, and of the others (Hartigan's typical values, 1969).
    The test of d = 0 counts the swaps with low <= 0 <= high, and the interval of the differences that are not rejected
    follows from the same swaps. An example that one of the two rules out outweighs all the others.
    """
    random = np.random.default_rng([seed, 7])
    items = len(weights)
    most = np.abs(gaps[np.isfinite(gaps)]).sum()
    finite = np.clip(gaps, -1e6 * (1 + most), 1e6 * (1 + most))
    total, whole = finite.sum(), weights.sum()
    ends = np.empty((2, resamples))
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        signs = random.integers(0, 2, (stop - start, items)) * 2 - 1
        sums, bases = signs @ finite, signs @ weights
        with np.errstate(divide="ignore", invalid="ignore"):
            swapped, kept = (total - sums) / (whole - bases), (total + sums) / (whole + bases)
        # Rounding must not move what is 0.
        near = 1e-12 * np.abs(finite).sum() / whole
        edges = np.where(np.abs([swapped, kept]) <= near, 0.0, [swapped, kept])
        # Nothing, or everything, is swapped: as far off whatever is taken off.
        same = np.abs(bases) == whole
        ends[0, start:stop] = np.where(same, -np.inf, np.minimum(*edges))
        ends[1, start:stop] = np.where(same, np.inf, np.maximum(*edges))
    if np.isinf(gaps).any():
        ends[np.abs(ends) * whole > 1e5 * (1 + most)] *= np.inf
    return ends[0], ends[1]


def _alpha(level: float) -> float:
    """The error that a test may make, free of the rounding of 1 - level."""
    return round(1 - level, 12)


def _percentiles(drawn: Array, level: float) -> tuple[float, float]:
    """The bounds of the central `level`. No interpolation: it cannot pass -inf."""
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)], method="nearest")
    return float(low), float(high)


def _split(values: Array) -> tuple[Array, Array]:
    """(values with 0 for -inf, 1 where -inf stood)."""
    impossible = np.isneginf(values)
    return np.where(impossible, 0.0, values), impossible.astype(np.float64)


def _minus(one: Any, other: Any) -> Array:
    """one - other, where two equal infinities differ by nothing."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(one == other, 0.0, one - other), dtype=np.float64)


LEVELS = ("all wrong", "under half", "half or more", "all right")
"""How many of several mixtures get an example right."""


def is_accuracy(scores: Scores) -> bool:
    """Whether every example is simply right (1) or wrong (0) and counts the same."""
    return bool(np.isin(scores.values, (0.0, 1.0)).all() and (scores.weights == 1).all())


def correctness_level(values: Array) -> Array:
    """Index into LEVELS of each example: [items], from values in {0, 1}, [mixtures, items]."""
    share = values.mean(axis=0)
    return np.asarray(np.select([share == 0, share < 0.5, share < 1], [0, 1, 2], 3), dtype=np.float64)


def emergence(before: Scores, after: Scores) -> Array:
    """Correctness emergence (arXiv 2410.11163, figure 2): [4, 4] examples by LEVELS before (rows) and after (columns).

    before: the single experts; after: the particles at the end, on the same examples. Raises ValueError for scores
    that are no accuracies.
    """
    if not is_accuracy(before) or not is_accuracy(after):
        raise ValueError("emergence: values are not right or wrong")
    matrix = np.zeros((len(LEVELS), len(LEVELS)))
    rows, columns = correctness_level(before.values).astype(int), correctness_level(after.values).astype(int)
    np.add.at(matrix, (rows, columns), 1)
    return matrix
