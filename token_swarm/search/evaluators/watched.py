"""Says how far an evaluation has come, while it runs somewhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from token_swarm.particle import Mixture
from token_swarm.search.utility import Evaluator, Scores, Utility, as_items


class WatchedEvaluator:
    """Hands another evaluator the work in pieces that take about `seconds`, and calls `tell` after each.

    tell: told the mixture-example pairs that are judged and all of them. at_once: mixtures that the other evaluator
    judges at the same time. Pieces are of mixtures; of examples where a utility writes texts (`by_items`), as the
    mixtures share what is read for one example. The results are the same as in one piece.
    """

    def __init__(
        self, inner: Evaluator, tell: Callable[[int, int], None], *, at_once: int = 1, seconds: float = 2.0
    ) -> None:
        self._inner, self._tell, self._at_once, self._seconds = inner, tell, at_once, seconds
        self._rate = 0.0  # pairs a second, once known

    def evaluate(self, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Evaluator.evaluate`."""
        chosen = as_items(items, utility.items).tolist()
        by_items = bool(getattr(utility, "by_items", False))
        whole, width = (len(chosen), len(mixtures)) if by_items else (len(mixtures), len(chosen))
        least = 1 if by_items else self._at_once
        parts: list[Scores] = []
        done = 0
        while done < whole or not parts:
            size = min(whole - done, max(least, int(self._rate * self._seconds / max(width, 1))))
            started = time.perf_counter()
            if by_items:
                parts.append(self._inner.evaluate(utility, mixtures, chosen[done : done + size]))
            else:
                parts.append(self._inner.evaluate(utility, mixtures[done : done + size], items))
            done += size
            self._rate = size * width / max(time.perf_counter() - started, 1e-9)
            if done < whole and width:
                self._tell(done * width, whole * width)
        if len(parts) == 1:
            return parts[0]
        return _beside(parts) if by_items else Scores.join(parts)


def _beside(parts: Sequence[Scores]) -> Scores:
    """Scores of the same mixtures on the items of all parts. A mixture that failed in one has failed."""
    values = np.concatenate([part.values for part in parts], axis=1)
    weights = np.concatenate([part.weights for part in parts])
    count = len(values)
    reasons = zip(*(part.failures or (None,) * count for part in parts), strict=True)
    failures = tuple(next((reason for reason in own if reason is not None), None) for own in reasons)
    values[[reason is not None for reason in failures]] = np.nan
    return replace(parts[0], values=values, weights=weights, failures=failures if any(failures) else ())
