"""The log-likelihood of texts: nats per byte, reported as bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

from token_swarm.particle import Mixture
from token_swarm.search.data import TextExample
from token_swarm.search.score_cache.cache import ScoreCache
from token_swarm.search.score_cache.reader import Passage
from token_swarm.search.utilities.kind import CachedKind
from token_swarm.search.utility import Array, Scores, as_items


class LogLikelihood:
    """How probable the examples' texts are; exact, from a cache of `passages` of the examples.

    values: nats of each text; weights: its bytes; the utility is nats per byte.
    """

    name = "loglikelihood"
    smooth = True

    def __init__(self, cache: ScoreCache) -> None:
        self.cache = cache
        self.items = len(cache.passages)

    @staticmethod
    def passages(examples: Sequence[TextExample]) -> list[Passage]:
        """What the cache must hold."""
        return [Passage(example.prompt, example.text, example.chat) for example in examples]

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`. Raises what `ScoreCache.score` raises."""
        chosen = as_items(items, self.items)
        return Scores(self.cache.score(mixtures, chosen.tolist()), self.cache.sizes[chosen])


def bits_per_byte(scores: Scores) -> Array:
    """Code length of likelihood `scores`, bits per byte: float64 [mixtures]."""
    return -scores.utility() / math.log(2)


KIND = CachedKind(TextExample, LogLikelihood.passages, lambda _, cache, __: LogLikelihood(cache))
