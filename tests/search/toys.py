"""A utility and an evaluator without any model, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from token_swarm.particle import Mixture
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.run import Task
from token_swarm.search.utility import Array, Scores, Utility, as_items

EXPERTS = ("a", "b", "c")
FINGERPRINTS = {name: f"fingerprint-of-{name}" for name in EXPERTS}


class Hills:
    """Each item is a hill over the weights with a top of its own; the utility is the mean height."""

    name = "hills"

    def __init__(self, items: int = 40, seed: int = 0, *, smooth: bool = True, sizes: bool = False) -> None:
        random = np.random.default_rng(seed)
        self.items, self.smooth = items, smooth
        self._tops = np.array([0.5, 0.3, 0.2]) + 0.3 * random.standard_normal((items, 3))
        self._weights = random.integers(1, 9, items).astype(float) if sizes else np.ones(items)
        self.calls: list[tuple[int, int]] = []

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        chosen = as_items(items, self.items)
        self.calls.append((len(mixtures), len(chosen)))
        points = np.array([[mixture.weights[name] for name in EXPERTS] for mixture in mixtures])
        heights = -((points[:, None] - self._tops[chosen]) ** 2).sum(axis=2)
        return Scores(heights * self._weights[chosen], self._weights[chosen])


class Here:
    """Evaluates in this process; `spoil` says which mixtures fail, and why."""

    def __init__(self, spoil: Callable[[Mixture], str | None] = lambda mixture: None) -> None:
        self._spoil = spoil

    def evaluate(self, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        scores = utility.evaluate(mixtures, items)
        reasons = tuple(self._spoil(mixture) for mixture in mixtures)
        values: Array = scores.values.copy()
        values[[reason is not None for reason in reasons]] = np.nan
        return Scores(values, scores.weights, reasons)


def task(space: Space | None = None, dev: Utility | None = None, **changes) -> Task:
    given = {
        "space": space or Space(EXPERTS),
        "dev": dev or Hills(),
        "test": Hills(seed=1),
        "experts": {name: f"laws-of-{name}" for name in EXPERTS},
        "fingerprints": FINGERPRINTS,
        "data_hash": "d" * 64,
    }
    return Task(**{**given, **changes})
