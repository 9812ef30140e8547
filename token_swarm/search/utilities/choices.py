"""Accuracies that follow from log-likelihoods: multiple choice and preference pairs. Exact, from the score cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.data import ChoiceExample, PreferenceExample
from token_swarm.search.score_cache.cache import ScoreCache
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utilities.kind import CachedKind, Normalise
from token_swarm.search.utility import Array, Scores, as_items


class _Continuations:
    """Log-probabilities of the continuations of each example, which lie one after another in the cache."""

    smooth = False

    def __init__(self, cache: ScoreCache, passages: Sequence[Passage], counts: Sequence[int], how: Normalise) -> None:
        if tuple(passages) != cache.passages:
            raise BadParameter("cache", cache.data_hash, "a cache of these examples' passages")
        self.cache, self.items = cache, len(counts)
        self._first = np.concatenate(([0], np.cumsum(counts)))
        self._how = how

    def _compare(self, mixtures: Sequence[Mixture], items: Sequence[int] | None) -> list[tuple[int, Array]]:
        """(example, what is compared: [mixtures, continuations]) of each chosen example."""
        examples = as_items(items, self.items).tolist()
        spans = [range(self._first[i], self._first[i + 1]) for i in examples]
        passages = [passage for span in spans for passage in span]
        scores = self.cache.score(mixtures, passages)
        if self._how is Normalise.BYTES:
            scores = scores / self.cache.sizes[passages]
        ends = np.cumsum([len(span) for span in spans])[:-1]
        return list(zip(examples, np.split(scores, ends, axis=1), strict=True)) if spans else []


def _accuracy(columns: Sequence[Array], mixtures: int) -> Scores:
    values = np.stack(columns, axis=1).astype(np.float64) if columns else np.empty((mixtures, 0))
    return Scores(values, np.ones(len(columns)))


class MultipleChoice(_Continuations):
    """Share of examples whose right continuation is the likeliest; of equals the first counts."""

    name = "multiple-choice"

    def __init__(
        self, cache: ScoreCache, examples: Sequence[ChoiceExample], normalise: Normalise = Normalise.SUM
    ) -> None:
        """Raises BadParameter when the cache is not of `passages(examples)`."""
        super().__init__(cache, self.passages(examples), [len(e.choices) for e in examples], normalise)
        self._answers = [example.answer for example in examples]

    @staticmethod
    def passages(examples: Sequence[ChoiceExample]) -> list[Passage]:
        """What the cache must hold."""
        return [Passage(e.prompt, choice, e.chat) for e in examples for choice in e.choices]

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`. values: 1 where right, else 0."""
        compared = self._compare(mixtures, items)
        columns = [scores.argmax(axis=1) == self._answers[example] for example, scores in compared]
        return _accuracy(columns, len(mixtures))


class Preference(_Continuations):
    """Share of pairs of which the chosen continuation is the likelier; equals count half."""

    name = "preference"

    def __init__(
        self, cache: ScoreCache, examples: Sequence[PreferenceExample], normalise: Normalise = Normalise.SUM
    ) -> None:
        """Raises BadParameter when the cache is not of `passages(examples)`."""
        super().__init__(cache, self.passages(examples), [2] * len(examples), normalise)

    @staticmethod
    def passages(examples: Sequence[PreferenceExample]) -> list[Passage]:
        """What the cache must hold."""
        return [Passage(e.prompt, text, e.chat) for e in examples for text in (e.chosen, e.rejected)]

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`. values: 1 where the chosen one is likelier, 0 where the other is."""
        compared = self._compare(mixtures, items)
        columns = [(np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2 for _, scores in compared]
        return _accuracy(columns, len(mixtures))


MULTIPLE_CHOICE = CachedKind(
    ChoiceExample,
    MultipleChoice.passages,
    lambda examples, cache, judging: MultipleChoice(cache, examples, judging.normalise),
    percent=True,
)
PREFERENCE = CachedKind(
    PreferenceExample,
    Preference.passages,
    lambda examples, cache, judging: Preference(cache, examples, judging.normalise),
    percent=True,
)
