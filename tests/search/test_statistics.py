"""Intervals cover, tests reject what is false and not what is true, and impossible examples do no harm."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from token_swarm.search.report.measure import Measure
from token_swarm.search.report.statistics import (
    LEVELS,
    Comparison,
    Interval,
    Resampling,
    correctness_level,
    emergence,
    is_accuracy,
)
from token_swarm.search.utilities.harmonic import HarmonicScores
from token_swarm.search.utility import Scores


def intervals(scores: Scores, **options) -> list[Interval]:
    resampling = Resampling(scores, **options)
    return [resampling.interval(mixture) for mixture in range(len(scores.values))]


def compare(scores: Scores, one: int, other: int, **options) -> Comparison:
    return Resampling(scores, **options).compare(one, other)


def normal(random: np.random.Generator, shift: float = 0.0, items: int = 60) -> Scores:
    """Two mixtures whose values go together, the first one better by `shift` per unit of weight."""
    weights = random.integers(1, 9, items).astype(float)
    common = random.standard_normal(items)
    noise = 0.3 * random.standard_normal((2, items))
    values = (common + noise + np.array([[shift], [0.0]])) * weights
    return Scores(values, weights)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((1, 400))
    ((interval),) = intervals(Scores(values, np.ones(400)))
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == values.mean()
    assert interval.low == pytest.approx(values.mean() - half, abs=0.006)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.006)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = random.standard_normal((1, 50))
        (interval,) = intervals(Scores(values, np.ones(50)), level=0.9, resamples=400)
        covered += interval.low <= 0 <= interval.high
    # 0.9 of 200, within four standard deviations and the bootstrap's known slight undercoverage.
    assert 160 <= covered <= 196


def test_examples_are_drawn_with_their_weights() -> None:
    """One utility for every example: whatever is drawn, the ratio is the same."""
    weights = np.array([1.0, 10.0, 100.0])
    (interval,) = intervals(Scores(-0.7 * weights[None], weights))
    assert interval.low == pytest.approx(-0.7)
    assert interval.high == pytest.approx(-0.7)


def test_equal_seeds_give_equal_intervals() -> None:
    scores = normal(np.random.default_rng(2))
    assert intervals(scores, seed=1) == intervals(scores, seed=1)
    assert intervals(scores, seed=1) != intervals(scores, seed=2)
    assert compare(scores, 0, 1, seed=1) == compare(scores, 0, 1, seed=1)


def test_the_permutation_test_is_the_exact_one_of_few_examples() -> None:
    gaps = np.array([0.9, 0.4, 0.8, -0.1, 0.5, 0.3])
    scores = Scores(np.stack([gaps, np.zeros(6)]), np.ones(6))
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=6)]
    exact = np.mean([value >= gaps.sum() - 1e-12 for value in sums])
    comparison = compare(scores, 0, 1)
    assert comparison.p_value == pytest.approx(exact, abs=0.01)
    assert comparison.difference.value == pytest.approx(gaps.mean())
    assert (comparison.wins, comparison.losses) == (5, 1)


def test_p_values_are_uniform_where_nothing_differs_and_small_where_it_does() -> None:
    random = np.random.default_rng(3)
    same = [compare(normal(random), 0, 1, resamples=300).p_value for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in same) <= 22
    assert 70 <= sum(p < 0.5 for p in same) <= 130
    better = [compare(normal(random, shift=0.3), 0, 1, resamples=300).p_value for _ in range(20)]
    assert max(better) < 0.05
    assert min(same + better) >= 1 / 301


def test_pairing_sees_what_the_single_intervals_hide() -> None:
    scores = normal(np.random.default_rng(4), shift=0.15)
    first, second = intervals(scores)
    assert first.low < second.high
    comparison = compare(scores, 0, 1)
    assert comparison.difference.low > 0
    assert comparison.p_value < 0.05


@pytest.mark.parametrize("kind", ["likelihood", "accuracy", "harmonic", "impossible"])
def test_the_interval_excludes_0_exactly_where_the_test_rejects(kind: str) -> None:
    """A headline that says "not distinguishable" beside an interval without 0 cannot happen."""
    random = np.random.default_rng(7)
    seen = set()
    for _ in range(60):
        scores = normal(random, shift=0.12, items=25)
        if kind in ("accuracy", "harmonic"):
            values = (random.random((2, 40)) < np.array([[0.75], [0.5]])).astype(float)
            scores = Scores(values, np.ones(40))
        if kind == "harmonic":
            scores = HarmonicScores(scores.values, np.ones(40), tasks=np.arange(40) % 2, logarithmic=(False, False))
        if kind == "impossible":
            scores.values[1, 3] = -np.inf
        comparison = compare(scores, 0, 1, resamples=499)
        assert comparison.significant == (comparison.p_value < 0.05)
        bounds = comparison.difference
        assert comparison.significant == (not bounds.low <= 0 <= bounds.high)
        assert bounds.low <= bounds.value <= bounds.high
        seen.add(comparison.significant)
    assert kind == "impossible" or seen == {True, False}


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(8)
    covered = 0
    for _ in range(300):
        bounds = compare(normal(random, shift=0.2, items=20), 0, 1, resamples=399).difference
        covered += bounds.low <= 0.2 <= bounds.high
    assert 271 <= covered <= 299  # 0.95 of 300, within four standard deviations


def test_too_few_examples_for_any_certainty_have_no_bounds() -> None:
    bounds = compare(Scores(np.array([[1.0, 2.0, 1.5], [0.0, 0.0, 0.0]]), np.ones(3)), 0, 1).difference
    assert (bounds.low, bounds.high) == (-math.inf, math.inf)
    assert Measure.of("loglikelihood").span(bounds) == "no bounds"


def test_a_mixture_is_not_better_than_itself() -> None:
    comparison = compare(normal(np.random.default_rng(5)), 1, 1)
    assert comparison.difference == Interval(0.0, 0.0, 0.0)
    assert comparison.p_value == 1
    assert (comparison.wins, comparison.losses) == (0, 0)


def test_an_impossible_example_outweighs_the_others() -> None:
    values = np.array([[-1.0, -np.inf, -1.0], [-5.0, -5.0, -np.inf], [-2.0, -2.0, -2.0]])
    scores = Scores(values, np.ones(3))
    with np.errstate(all="raise"):
        first, _, third = intervals(scores)
        assert first.low == first.value == -np.inf
        assert np.isfinite(first.high)  # of draws without that example
        assert third.low == third.high == -2
        worse = compare(scores, 0, 2)
        assert worse.difference.value == -np.inf
        # Only the side of the impossible example counts, and that is a coin.
        assert worse.p_value == 1
        both = compare(scores, 0, 1)
        assert both.difference.value == 0
    assert both.p_value == 1


def test_a_harmonic_mean_is_resampled_as_one() -> None:
    random = np.random.default_rng(6)
    values = (random.random((2, 80)) < np.array([[0.8], [0.4]])).astype(float)
    tasks = np.arange(80) % 2
    scores = HarmonicScores(values, np.ones(80), tasks=tasks, logarithmic=(False, False))
    first, second = intervals(scores, resamples=2500)
    assert first.value == scores.utility()[0]
    assert first.low < first.value < first.high
    assert second.high < first.low
    comparison = compare(scores, 0, 1, resamples=2500)
    assert comparison.difference.value == pytest.approx(first.value - second.value)
    assert comparison.p_value < 0.01


def test_emergence_counts_examples_by_level_before_and_after() -> None:
    ones = np.ones(5)
    before = Scores(np.array([[0, 1, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0.0]]), ones)
    after = Scores(np.array([[1, 1, 0, 1, 1], [0, 1, 0, 1, 1.0]]), ones)
    assert correctness_level(before.values).tolist() == [0, 1, 2, 3, 2]
    matrix = emergence(before, after)
    assert matrix.sum() == 5
    assert (matrix[0, 2], matrix[1, 3], matrix[2, 0], matrix[3, 3], matrix[2, 3]) == (1, 1, 1, 1, 1)
    assert len(LEVELS) == 4


def test_what_is_no_accuracy_has_no_emergence() -> None:
    right = Scores(np.array([[0.0, 1.0]]), np.ones(2))
    assert is_accuracy(right)
    for other in (Scores(np.array([[0.5, 1.0]]), np.ones(2)), Scores(np.array([[0.0, 1.0]]), np.array([1.0, 2.0]))):
        assert not is_accuracy(other)
        with pytest.raises(ValueError, match="right or wrong"):
            emergence(right, other)


def test_utilities_are_shown_in_the_fields_units() -> None:
    bits = Measure.of("loglikelihood")
    assert bits.text(-math.log(2)) == "1.0000"
    assert bits.span(Interval(-1.0, -1.2 * math.log(2), -0.9 * math.log(2))) == "0.9000 to 1.2000"
    assert Measure.of("multiple-choice").text(0.42) == "42.0"
    assert Measure.of("judge").text(7.25, signed=True) == "+7.2500"
