"""Utilities that the cache makes exact: choices, preferences, and several tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Rule
from token_swarm.search.data import ChoiceExample, PreferenceExample, TextExample
from token_swarm.search.score_cache.cache import ScoreCache, fill
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utilities import (
    Harmonic,
    LogLikelihood,
    MultipleChoice,
    Normalise,
    Preference,
)
from token_swarm.search.utility import Scores, as_items

MIXTURES = [
    Mixture({"e0": 1.0}),
    Mixture({"e1": 1.0}, Rule.LINEAR),
    Mixture({"e0": 0.5, "e1": 0.5}, Rule.LINEAR),
    Mixture({"e0": -0.4, "e1": 1.3}),
]
CHOICES = [
    ChoiceExample(prompt="ab" * i, choices=["abc"[i % 3] * (1 + j) + "bca"[j] for j in range(2 + i % 2)], answer=i % 2)
    for i in range(7)
]
PAIRS = [PreferenceExample(prompt="c" * i, chosen="ab" * (1 + i % 3), rejected="bbca"[i % 4 :]) for i in range(6)]
TEXTS = [TextExample(text="abc" * (i + 1)) for i in range(3)]


@pytest.fixture(scope="module")
def local() -> LocalEnsemble:
    return LocalEnsemble(toys([NESTED, LONG]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def cache_of(root: Path, passages: Sequence[Passage]) -> ScoreCache:
    return ScoreCache(root, [fill(root, expert, passages) for expert in toys([NESTED, LONG]).values()], passages)


def score(local: LocalEnsemble, prompt: str, text: str, mixture: Mixture, how: Normalise) -> float:
    total = local.score(prompt, text, mixture).log_prob
    return total if how is Normalise.SUM else total / len(text)


@pytest.mark.parametrize("how", list(Normalise))
def test_multiple_choice(local: LocalEnsemble, root: Path, how: Normalise) -> None:
    utility = MultipleChoice(cache_of(root, MultipleChoice.passages(CHOICES)), CHOICES, how)
    scores = utility.evaluate(MIXTURES)
    expected = np.asarray(
        [
            [
                int(np.argmax([score(local, e.prompt, choice, mixture, how) for choice in e.choices])) == e.answer
                for e in CHOICES
            ]
            for mixture in MIXTURES
        ]
    )
    assert np.array_equal(scores.values, expected)
    assert scores.utility() == pytest.approx(expected.mean(1))
    assert not utility.smooth
    assert 0 < scores.utility().mean() < 1
    assert np.array_equal(utility.evaluate(MIXTURES, [5, 0]).values, expected[:, [5, 0]])
    assert utility.evaluate(MIXTURES, []).values.shape == (4, 0)


def test_the_two_normalisations_differ(root: Path) -> None:
    """A long continuation loses by its sum."""
    examples = [ChoiceExample(prompt="", choices=[c, "bcabcabc" * 2], answer=1) for c in "abc"]
    cache = cache_of(root, MultipleChoice.passages(examples))
    by_sum, by_bytes = (MultipleChoice(cache, examples, how).evaluate(MIXTURES).values for how in Normalise)
    assert not by_sum.any()
    assert by_bytes.any()


@pytest.mark.parametrize("how", list(Normalise))
def test_preference(local: LocalEnsemble, root: Path, how: Normalise) -> None:
    utility = Preference(cache_of(root, Preference.passages(PAIRS)), PAIRS, how)
    expected = [
        [
            score(local, e.prompt, e.chosen, mixture, how) > score(local, e.prompt, e.rejected, mixture, how)
            for e in PAIRS
        ]
        for mixture in MIXTURES
    ]
    assert np.array_equal(utility.evaluate(MIXTURES).values, np.asarray(expected, dtype=float))
    assert 0 < np.mean(expected) < 1


def test_equals_count_half(root: Path) -> None:
    examples = [PreferenceExample(prompt="a", chosen="bc", rejected="bc")]
    utility = Preference(cache_of(root, Preference.passages(examples)), examples)
    assert utility.evaluate(MIXTURES[:1]).values.tolist() == [[0.5]]


def test_a_cache_of_other_examples_is_refused(root: Path) -> None:
    cache = cache_of(root, MultipleChoice.passages(CHOICES[1:]))
    with pytest.raises(BadParameter, match="a cache of these examples' passages"):
        MultipleChoice(cache, CHOICES)


class Fixed:
    """A utility whose values are given."""

    def __init__(self, name: str, values: list[float], weights: list[float]) -> None:
        self.name, self.smooth = name, name == "loglikelihood"
        self.values, self.weights, self.items = np.asarray(values), np.asarray(weights), len(values)

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        chosen = as_items(items, self.items)
        return Scores(np.tile(self.values[chosen], (len(mixtures), 1)), self.weights[chosen])


LIKELIHOOD = Fixed("loglikelihood", [-4.0, -8.0], [4.0, 8.0])
ACCURACY = Fixed("accuracy", [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [1.0] * 6)


def test_the_harmonic_mean_of_tasks() -> None:
    scores = Harmonic([LIKELIHOOD, ACCURACY]).evaluate(MIXTURES)
    likelihood, accuracy = np.exp(-12 / 12), 4 / 6
    assert scores.utility() == pytest.approx([2 / (1 / likelihood + 1 / accuracy)] * 4)
    assert scores.of_task(0).utility() == pytest.approx([-1.0] * 4)
    assert scores.of_task(1).utility() == pytest.approx([accuracy] * 4)
    assert Harmonic([LIKELIHOOD]).smooth
    assert not Harmonic([LIKELIHOOD, ACCURACY]).smooth


def test_a_prefix_of_the_items_holds_every_task() -> None:
    harmonic = Harmonic([LIKELIHOOD, ACCURACY])
    assert harmonic.items == 8
    scores = harmonic.evaluate(MIXTURES, range(4))
    assert np.bincount(scores.tasks).tolist() == [1, 3]
    indices = {harmonic.item(task, i) for task, count in ((0, 2), (1, 6)) for i in range(count)}
    assert indices == set(range(8))
    assert harmonic.evaluate(MIXTURES, [harmonic.item(0, 1), harmonic.item(1, 2)]).values[0].tolist() == [-8.0, 0.0]


def test_a_resample_is_averaged_by_task() -> None:
    scores = Harmonic([LIKELIHOOD, ACCURACY]).evaluate(MIXTURES[:1])
    first = int(np.flatnonzero(scores.tasks == 1)[0])
    only = scores.take([first, first])
    assert only.utility() == pytest.approx(scores.values[:, first])
    everything = scores.take(range(8))
    assert np.array_equal(everything.utility(), scores.utility())


def test_a_task_at_zero_spoils_the_mean_and_a_negative_one_is_refused() -> None:
    assert Harmonic([LIKELIHOOD, Fixed("a", [0.0], [1.0])]).evaluate(MIXTURES).utility().tolist() == [0.0] * 4
    negative = Harmonic([LIKELIHOOD, Fixed("reward", [-1.0], [1.0])]).evaluate(MIXTURES)
    with pytest.raises(ValueError, match=r"task 1: a utility of -1\.0"):
        negative.utility()
    with pytest.raises(BadParameter, match="none of them harmonic"):
        Harmonic([])
    with pytest.raises(BadParameter, match="none of them harmonic"):
        Harmonic([Harmonic([LIKELIHOOD])])


def test_real_tasks_together(root: Path) -> None:
    choice = MultipleChoice(cache_of(root, MultipleChoice.passages(CHOICES)), CHOICES)
    text = LogLikelihood(cache_of(root, LogLikelihood.passages(TEXTS)))
    scores = Harmonic([choice, text]).evaluate(MIXTURES)
    expected = 2 / (1 / choice.evaluate(MIXTURES).utility() + 1 / np.exp(text.evaluate(MIXTURES).utility()))
    assert scores.utility() == pytest.approx(expected)


def test_scores_fit_together() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Scores(np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(ValueError, match="failures"):
        Scores(np.zeros((2, 3)), np.zeros(3), ("a",))
    left = Scores(np.full((1, 2), np.nan), np.ones(2), ("broken",))
    right = Scores(np.zeros((2, 2)), np.asarray([3.0, 5.0]))
    joined = Scores.join([left, right])
    assert joined.failures == ("broken", None, None)
    assert joined.weights.tolist() == [3.0, 5.0]
    assert Scores.join([right, right]).failures == ()
