"""The utilities by name: which data they take, and what of it experts must have read beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from token_swarm.errors import BadParameter, UnknownName
from token_swarm.search.data import (
    AnswerExample,
    ChoiceExample,
    Example,
    PatternExample,
    PreferenceExample,
    PromptExample,
    TextExample,
)
from token_swarm.search.score_cache import ScoreCache
from token_swarm.search.scoring import Passage
from token_swarm.search.utilities.choices import MultipleChoice, Normalise, Preference
from token_swarm.search.utilities.likelihood import LogLikelihood
from token_swarm.search.utility import Utility


@dataclass(frozen=True)
class Kind:
    """One kind of utility. schema: of its examples; passages: what the score cache must hold, None if it generates."""

    schema: type[Example]
    passages: Callable[[Sequence[Any]], list[Passage]] | None = None


KINDS = {
    "loglikelihood": Kind(TextExample, LogLikelihood.passages),
    "multiple-choice": Kind(ChoiceExample, MultipleChoice.passages),
    "preference": Kind(PreferenceExample, Preference.passages),
    "exact-match": Kind(AnswerExample),
    "regex": Kind(PatternExample),
    "reward": Kind(PromptExample),
    "judge": Kind(PromptExample),
}
"""All but `harmonic`, which takes other utilities."""


def kind_of(name: str) -> Kind:
    """The kind by its name. Raises UnknownName."""
    if name not in KINDS:
        raise UnknownName("utility", name, KINDS)
    return KINDS[name]


def cached_utility(
    name: str, cache: ScoreCache, examples: Sequence[Any], normalise: Normalise = Normalise.SUM
) -> Utility:
    """A utility that is exact from the cache. Raises UnknownName, and BadParameter for one that generates."""
    if kind_of(name).passages is None:
        raise BadParameter("utility", name, "one that is exact from the cache: it judges generated text")
    if name == "multiple-choice":
        return MultipleChoice(cache, examples, normalise)
    if name == "preference":
        return Preference(cache, examples, normalise)
    return LogLikelihood(cache)
