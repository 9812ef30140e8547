"""What a utility tells a search: which examples it reads, and how it is made of them.

A utility is one module here, or in another distribution, with a `KIND`, and one entry of `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from token_swarm.decoding.request import DecodeRequest
from token_swarm.search.data import Example
from token_swarm.search.score_cache.cache import ScoreCache
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utility import Utility

if TYPE_CHECKING:
    from token_swarm.search.utilities.generation import Generations
    from token_swarm.search.utilities.judge import JudgeSettings


class Normalise(Enum):
    """How continuations of different lengths are compared."""

    SUM = "sum"
    """By their log-probability."""
    BYTES = "bytes"
    """By their log-probability per byte."""


@dataclass(frozen=True)
class Judging:
    """How examples are judged: what only some of the utilities look at. request: how texts are written."""

    normalise: Normalise = Normalise.SUM
    extract: str | None = None
    numeric: bool = False
    reward: str | None = None
    judge: JudgeSettings | None = None
    request: DecodeRequest = field(default_factory=DecodeRequest)


@dataclass(frozen=True)
class CachedKind:
    """A utility that is judged from the score cache: nothing is generated.

    schema: class of its examples. passages: what the cache has to hold, the examples' one after another. make: the
    utility of (examples, the cache of their passages, settings). percent: its values are 0 to 1, shown as percentages.
    """

    schema: type[Example]
    passages: Callable[[Sequence[Any]], list[Passage]]
    make: Callable[[Sequence[Any], ScoreCache, Judging], Utility]
    percent: bool = False


@dataclass(frozen=True)
class WrittenKind:
    """A utility that judges texts which the mixtures write.

    make: the utility of (examples, their texts, settings); raises BadParameter for settings that are missing or bad.
    light: make loads nothing, so that settings can be checked with it before a model is loaded.
    """

    schema: type[Example]
    make: Callable[[Sequence[Any], Generations, Judging], Utility]
    light: Callable[[Judging], bool] = lambda _: True
    percent: bool = False


UtilityKind = CachedKind | WrittenKind
