"""An evaluation in pieces says how far it is, and is the same as in one piece."""

from __future__ import annotations

import numpy as np
import pytest

from tests.search.toys import EXPERTS, Hills
from token_swarm.particle import Mixture
from token_swarm.search.evaluators import SerialEvaluator, WatchedEvaluator
from token_swarm.search.optimisers.space import Space


class ByExample(Hills):
    """A utility whose mixtures are judged together, example by example."""

    by_items = True


@pytest.mark.parametrize("kind", [Hills, ByExample])
@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_a_watched_evaluation_says_how_far_it_is_and_changes_nothing(kind, seconds: float) -> None:
    told: list[tuple[int, int]] = []
    utility = kind(items=12, sizes=True)
    mixtures = Space(EXPERTS).mixtures(np.random.default_rng(0).random((7, 3)))
    watched = WatchedEvaluator(SerialEvaluator(), lambda done, total: told.append((done, total)), seconds=seconds)
    for items in (None, [5, 3, 11], []):
        told.clear()
        got, expected = watched.evaluate(utility, mixtures, items), utility.evaluate(mixtures, items)
        assert np.array_equal(got.values, expected.values)
        assert np.array_equal(got.weights, expected.weights)
        count = 12 if items is None else len(items)
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert all(0 < done < total == 7 * count for done, total in told)
        if seconds == 0 and count > 1:
            assert len(told) == (count if kind is ByExample else 7) - 1


class Choosy(ByExample):
    """Fails on one mixture at one example."""

    def evaluate(self, mixtures, items=None):
        if items is not None and 2 in items and any(mixture.weights["a"] == 0 for mixture in mixtures):
            raise ValueError("no a")
        return super().evaluate(mixtures, items)


def test_a_mixture_that_fails_in_one_piece_has_failed() -> None:
    mixtures = [Mixture({"a": 0.0, "b": 1.0, "c": 0.0}), Mixture({"a": 0.5, "b": 0.5, "c": 0.0})]
    scores = WatchedEvaluator(SerialEvaluator(), lambda *_: None, seconds=0.0).evaluate(Choosy(items=4), mixtures)
    assert np.isnan(scores.values[0]).all()
    assert np.isfinite(scores.values[1]).all()
    assert scores.failures == ("ValueError: no a", None)
