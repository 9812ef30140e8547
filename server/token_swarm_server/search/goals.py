"""What a search is judged by: the utilities by name, their examples, and how each is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.search import data
from token_swarm.search.score_cache.cache import ScoreCache
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utilities import (
    ExactMatch,
    Generations,
    Judge,
    JudgeClient,
    JudgeSettings,
    LogLikelihood,
    MultipleChoice,
    Normalise,
    Preference,
    Regex,
    Reward,
    SequenceClassifier,
    load_function,
)
from token_swarm.search.utility import Utility


class UtilityName(StrEnum):
    """Values of --utility."""

    LOGLIKELIHOOD = "loglikelihood"
    MULTIPLE_CHOICE = "multiple-choice"
    PREFERENCE = "preference"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    REWARD = "reward"
    JUDGE = "judge"


SCHEMAS: dict[UtilityName, type[data.Example]] = {
    UtilityName.LOGLIKELIHOOD: data.TextExample,
    UtilityName.MULTIPLE_CHOICE: data.ChoiceExample,
    UtilityName.PREFERENCE: data.PreferenceExample,
    UtilityName.EXACT_MATCH: data.AnswerExample,
    UtilityName.REGEX: data.PatternExample,
    UtilityName.REWARD: data.PromptExample,
    UtilityName.JUDGE: data.PromptExample,
}
CACHED = (UtilityName.LOGLIKELIHOOD, UtilityName.MULTIPLE_CHOICE, UtilityName.PREFERENCE)
"""Judged from the score cache; the others write text."""


@dataclass(frozen=True)
class Goal:
    """One utility and its examples. Several of them are one harmonic mean."""

    utility: UtilityName
    dataset: data.Dataset[Any]

    @classmethod
    def load(cls, utility: UtilityName, path: Path, limit: int | None) -> Goal:
        """Read the first `limit` examples of a JSONL file; None: all. Raises DataError, BadParameter, OSError."""
        return cls(utility, data.load_jsonl(path, SCHEMAS[utility]).head(limit))

    def sides(self, test: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the (dev, test) examples; all of them are dev for a share of 0. Raises BadParameter."""
        return self.dataset.split(test) if test else (tuple(range(len(self.dataset))), ())

    def check(self, judging: Judging) -> None:
        """Find what is wrong with examples or `judging` before anything is loaded. Raises BadParameter."""
        if self.utility not in CACHED and not (self.utility is UtilityName.REWARD and not judging.is_function):
            writing(self, judging, Generations(_never, judging.request))

    def passages_of(self, example: int) -> range:
        """Which of `passages` are an example's."""
        counts = [len(each.choices) if isinstance(each, data.ChoiceExample) else 1 for each in self.dataset.examples]
        if self.utility is UtilityName.PREFERENCE:
            counts = [2] * len(counts)
        first = sum(counts[:example])
        return range(first, first + counts[example])


@dataclass(frozen=True)
class Judging:
    """How examples are judged: what only some of the utilities look at."""

    normalise: Normalise = Normalise.SUM
    extract: str | None = None
    numeric: bool = False
    reward: str | None = None
    judge: JudgeSettings | None = None
    request: DecodeRequest = field(default_factory=DecodeRequest)

    @property
    def is_function(self) -> bool:
        """Whether the reward is module:function, not a model."""
        return self.reward is not None and ":" in self.reward and not Path(self.reward).exists()


def passages_of_goal(goal: Goal) -> list[Passage]:
    """What the score cache has to hold for a goal; nothing for one that writes text."""
    examples = goal.dataset.examples
    if goal.utility is UtilityName.LOGLIKELIHOOD:
        return LogLikelihood.passages(examples)
    if goal.utility is UtilityName.MULTIPLE_CHOICE:
        return MultipleChoice.passages(examples)
    return Preference.passages(examples) if goal.utility is UtilityName.PREFERENCE else []


def cached(goal: Goal, cache: ScoreCache, normalise: Normalise) -> Utility:
    """A utility that is judged from the score cache of its passages."""
    if goal.utility is UtilityName.LOGLIKELIHOOD:
        return LogLikelihood(cache)
    kind = MultipleChoice if goal.utility is UtilityName.MULTIPLE_CHOICE else Preference
    return kind(cache, goal.dataset.examples, normalise)


def writing(goal: Goal, judging: Judging, generations: Generations) -> Utility:
    """A utility that judges texts. Raises BadParameter for a reward or a judge that is missing."""
    examples = goal.dataset.examples
    if goal.utility is UtilityName.EXACT_MATCH:
        return ExactMatch(examples, generations, extract=judging.extract, numeric=judging.numeric)
    if goal.utility is UtilityName.REGEX:
        return Regex(examples, generations)
    if goal.utility is UtilityName.JUDGE:
        if judging.judge is None:
            raise BadParameter("judge", None, "the address and the name of a model that judges")
        folder = None if generations.folder is None else generations.folder.parent / "judgements"
        return Judge(examples, generations, JudgeClient(judging.judge, folder))
    if judging.reward is None:
        raise BadParameter("reward", None, "module:function, or the directory or hub id of a sequence classifier")
    function = load_function(judging.reward) if judging.is_function else SequenceClassifier(judging.reward)
    return Reward(examples, generations, function)


def _never(*_: object) -> str:
    raise AssertionError("nothing is generated by a check")
