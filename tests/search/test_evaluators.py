"""The same results in this process, in several, and on a local Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Rule
from token_swarm.search.evaluators import ProcessPoolEvaluator, RayEvaluator, Remade, SerialEvaluator
from token_swarm.search.evaluators.serial import pieces
from token_swarm.search.score_cache.cache import ScoreCache, fill
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utilities import LogLikelihood
from token_swarm.search.utility import Evaluator, Scores, UtilityUnavailable, as_items

MIXTURES = [
    *(Mixture({"e0": w, "e1": 1 - w}, rule) for rule in Rule for w in (0.0, 0.25, 0.6, 1.0)),
    Mixture({"e0": 1.5, "e1": -0.5}),
]


class Fragile:
    """Says its first weight; fails in as many ways as the weight of e1 says."""

    name, smooth, items = "fragile", False, 3

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        chosen = as_items(items, self.items)
        for mixture in mixtures:
            match mixture.weights.get("e1"):
                case 1.0:
                    raise RuntimeError("it broke")
                case 2.0:
                    raise UtilityUnavailable("nobody answers")
                case 3.0:
                    os._exit(3)
        values = [[mixture.weights["e0"] * (item + 1) for item in chosen] for mixture in mixtures]
        return Scores(np.asarray(values).reshape(len(mixtures), chosen.size), np.full(chosen.size, 2.0))


def made(count: int) -> Fragile:
    utility = Fragile()
    utility.items = count
    return utility


@pytest.fixture(scope="module")
def pool() -> Iterator[Evaluator]:
    with ProcessPoolEvaluator(2) as evaluator:
        yield evaluator


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Evaluator]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'token-swarm[ray]'")
    # One worker: each of them spends seconds on importing torch.
    with RayEvaluator(1, num_cpus=1, include_dashboard=False) as evaluator:
        yield evaluator


@pytest.fixture(params=["serial", "pool", "ray_cluster"])
def evaluator(request: pytest.FixtureRequest) -> Evaluator:
    if request.param == "serial":
        return SerialEvaluator()
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_a_cached_utility_gives_the_same_everywhere(evaluator: Evaluator, tmp_path: Path) -> None:
    passages = [Passage("ab", "cab" * (i + 1)) for i in range(5)]
    keys = [fill(tmp_path, expert, passages) for expert in toys([NESTED, LONG]).values()]
    utility = LogLikelihood(ScoreCache(tmp_path, keys, passages))
    expected = utility.evaluate(MIXTURES, [4, 1])
    scores = evaluator.evaluate(utility, MIXTURES, [4, 1])
    assert np.array_equal(scores.values, expected.values)
    assert np.array_equal(scores.weights, expected.weights)
    assert scores.failures == ()


def test_a_mixture_that_fails_is_not_a_number_and_says_why(evaluator: Evaluator) -> None:
    utility = Fragile()
    mixtures = [Mixture({"e0": 2.0}), Mixture({"e0": 1.0, "e1": 1.0}), Mixture({"e0": 3.0})]
    scores = evaluator.evaluate(utility, mixtures)
    assert scores.values[[0, 2]].tolist() == [[2.0, 4.0, 6.0], [3.0, 6.0, 9.0]]
    assert np.isnan(scores.values[1]).all()
    assert scores.failures == (None, "RuntimeError: it broke", None)
    assert scores.weights.tolist() == [2.0, 2.0, 2.0]
    assert scores.utility()[[0, 2]].tolist() == [2.0, 3.0]
    everything = evaluator.evaluate(utility, mixtures[1:2])
    assert np.isnan(everything.utility()).all()
    assert everything.failures == ("RuntimeError: it broke",)
    assert evaluator.evaluate(utility, []).values.shape == (0, 3)
    with pytest.raises(IndexError, match="items"):
        evaluator.evaluate(utility, mixtures, [3])


def test_what_only_the_user_can_mend_stops_it(evaluator: Evaluator) -> None:
    with pytest.raises(UtilityUnavailable, match="nobody answers"):
        evaluator.evaluate(Fragile(), [Mixture({"e0": 1.0}), Mixture({"e0": 1.0, "e1": 2.0})])


def test_a_utility_may_be_made_where_it_runs(evaluator: Evaluator) -> None:
    utility = Remade(partial(made, 2), name="fragile", smooth=False, items=2)
    assert evaluator.evaluate(utility, [Mixture({"e0": 5.0})]).values.tolist() == [[5.0, 10.0]]
    other = Remade(partial(made, 4), name="fragile", smooth=False, items=2)
    scores = evaluator.evaluate(other, [Mixture({"e0": 5.0})])
    assert scores.failures == ("ValueError: factory: it made 'fragile' of 4 examples, not 'fragile' of 2 examples",)


@pytest.mark.parametrize("name", ["pool", "ray_cluster"])
def test_one_that_cannot_be_sent_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    utility = Fragile()
    utility.local = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(BadParameter, match=r"'fragile' .* wrap it in .*Remade"):
        request.getfixturevalue(name).evaluate(utility, MIXTURES)


@pytest.mark.parametrize("name", ["pool", "ray_cluster"])
def test_a_process_that_dies_is_reported_and_replaced(name: str, request: pytest.FixtureRequest) -> None:
    evaluator, utility = request.getfixturevalue(name), Fragile()
    with pytest.raises(UtilityUnavailable, match="died while it judged fragile"):
        evaluator.evaluate(utility, [Mixture({"e0": 1.0, "e1": 3.0})])
    assert evaluator.evaluate(utility, [Mixture({"e0": 1.0})]).values.tolist() == [[1.0, 2.0, 3.0]]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(BadParameter, match="processes"):
        ProcessPoolEvaluator(0)
    with pytest.raises(BadParameter, match="threads"):
        ProcessPoolEvaluator(1, threads=0)
    with pytest.raises(BadParameter, match="workers"):
        RayEvaluator(0)


def test_mixtures_are_divided_without_loss() -> None:
    for count in (1, 2, 3, 9, 20):
        parts = pieces(MIXTURES, count)
        assert [mixture for part in parts for mixture in part] == MIXTURES
        assert len(parts) == min(count, len(MIXTURES))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
