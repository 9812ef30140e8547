"""Runs a utility in this process; what every other evaluator runs in its workers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from token_swarm.particle import Mixture
from token_swarm.search.utility import Scores, Utility, UtilityUnavailable, as_items


class SerialEvaluator:
    """One mixture after another, here."""

    def evaluate(self, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Evaluator.evaluate`. UtilityUnavailable is passed on."""
        return judge(utility, mixtures, items)


def judge(utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None) -> Scores:
    """All mixtures together; one by one when that fails, so that only the mixtures that it fails on get NaN.

    Raises IndexError for items that the utility does not have, UtilityUnavailable.
    """
    columns = as_items(items, utility.items)
    try:
        return utility.evaluate(mixtures, items)
    except UtilityUnavailable:
        raise
    except Exception as error:
        if len(mixtures) != 1:
            return Scores.join([judge(utility, [mixture], items) for mixture in mixtures])
        values = np.full((1, columns.size), np.nan)
        return Scores(values, np.ones(columns.size), (f"{type(error).__name__}: {error}",))


def pieces(mixtures: Sequence[Mixture], count: int) -> list[list[Mixture]]:
    """At most `count` runs of mixtures of nearly one length, none empty."""
    bounds = np.linspace(0, len(mixtures), min(count, len(mixtures)) + 1).astype(int).tolist()
    return [list(mixtures[low:high]) for low, high in pairwise(bounds)]
