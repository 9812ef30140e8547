"""The log-likelihood of texts: nats per byte, reported as bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

from token_swarm.particle import Mixture
from token_swarm.search.score_cache import ScoreCache
from token_swarm.search.utility import Array, Scores, as_items


class LogLikelihood:
    """How probable the examples' texts are; exact, from the cache.

    values: nats of each text; weights: its bytes; the utility is nats per byte.
    """

    name = "loglikelihood"
    smooth = True

    def __init__(self, cache: ScoreCache, first: int = 0, items: int | None = None) -> None:
        """The examples are passages `first` to `first + items` of the cache; all that follow for None."""
        self.cache, self._first = cache, first
        self.items = len(cache.passages) - first if items is None else items

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`. Raises what `ScoreCache.score` raises."""
        chosen = (as_items(items, self.items) + self._first).tolist()
        return Scores(self.cache.score(mixtures, chosen), self.cache.sizes[chosen])


def bits_per_byte(scores: Scores) -> Array:
    """Code length of likelihood `scores`, bits per byte: float64 [mixtures]."""
    return -scores.utility() / math.log(2)
