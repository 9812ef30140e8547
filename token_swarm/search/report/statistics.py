"""How sure a score is, and whether one mixture is better than another: resampling over the examples."""

from __future__ import annotations

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

    difference: its utility minus the other's, with a paired bootstrap interval; p_value: of a two-sided paired
    permutation test; wins, losses: examples on which it is better, worse.
    """

    difference: Interval
    p_value: float
    wins: int
    losses: int


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
        """Mixture `one` against mixture `other`.

        The permutation test swaps the two on each example with probability 1/2 (Good 2005, section 3.7); its p-value
        counts the observed one among the swaps, so that it is never 0.
        """
        pair = replace(self._scores, values=self._scores.values[[one, other]], failures=())
        observed = float(_minus(self._utilities[one], self._utilities[other]))
        swapped = _swapped(pair, self._seed, self._count)
        # Rounding must not make the same sum in another order a smaller one.
        as_far = int((np.abs(swapped) >= abs(observed) * (1 - 1e-12)).sum())
        gaps = _minus(pair.values[0], pair.values[1])
        between = _minus(self._drawn[:, one], self._drawn[:, other])
        return Comparison(
            difference=Interval(observed, *_percentiles(between, self._level)),
            p_value=(1 + as_far) / (1 + self._count),
            wins=int((gaps > 0).sum()),
            losses=int((gaps < 0).sum()),
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


def _swapped(pair: Scores, seed: int, resamples: int) -> Array:
    """Differences of the two mixtures' utilities after swapping them on random examples: [resamples]."""
    random = np.random.default_rng([seed, 7])
    differences = np.empty(resamples)
    items = len(pair.weights)
    if type(pair) is not Scores:
        for row in range(resamples):
            swap = random.integers(0, 2, items).astype(bool)
            first, second = replace(pair, values=np.where(swap, pair.values[::-1], pair.values)).utility()
            differences[row] = _minus(first, second)
        return differences
    gaps = _minus(pair.values[0], pair.values[1])
    # An example that one of them rules out outweighs all the others; infinities would not add up.
    most = np.abs(gaps[np.isfinite(gaps)]).sum()
    finite = np.clip(gaps, -1e6 * (1 + most), 1e6 * (1 + most))
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        signs = random.integers(0, 2, (stop - start, items)) * 2 - 1
        differences[start:stop] = signs @ finite / pair.weights.sum()
    if np.isinf(gaps).any():
        differences[np.abs(differences) * pair.weights.sum() > 1e5 * (1 + most)] *= np.inf
    return differences


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
