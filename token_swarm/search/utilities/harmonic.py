"""Several tasks at once: the harmonic mean of their utilities, which no task can be sacrificed for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.utility import Array, Scores, Utility, as_items

Tasks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HarmonicScores(Scores):
    """Scores of several tasks side by side. tasks: int64 [items], the task of each item.

    logarithmic[t]: task t's utility is a mean log-likelihood, and its exponential is what is averaged.
    """

    tasks: Tasks = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    logarithmic: tuple[bool, ...] = ()

    def of_task(self, task: int) -> Scores:
        """One task's scores, as its own utility gives them."""
        columns = np.flatnonzero(self.tasks == task)
        return Scores(self.values[:, columns], self.weights[columns], self.failures)

    def utility(self) -> Array:
        """Harmonic mean over the tasks that have items, float64 [mixtures]; 0 when one of them is at 0.

        A likelihood counts as the geometric mean of a byte's probability. Raises ValueError for a task whose utility
        is negative: a mean of such numbers means nothing.
        """
        parts = []
        for task in np.unique(self.tasks).tolist():
            utility = self.of_task(task).utility()
            positive = np.exp(utility) if self.logarithmic[task] else utility
            if (positive < 0).any():
                raise ValueError(f"task {task}: a utility of {positive.min()} has no harmonic mean; it must be >= 0")
            parts.append(positive)
        with np.errstate(divide="ignore"):
            mean: Array = len(parts) / np.sum([1 / part for part in parts], axis=0)
        return mean

    def take(self, columns: Sequence[int] | npt.NDArray[np.int64]) -> Self:
        """See `Scores.take`."""
        chosen = np.asarray(columns, dtype=np.int64)
        return replace(self, values=self.values[:, chosen], weights=self.weights[chosen], tasks=self.tasks[chosen])


class Harmonic:
    """The harmonic mean of several utilities.

    Its items are those of all tasks, interleaved, so that the first n of them hold each task in proportion.
    """

    name = "harmonic"

    def __init__(self, utilities: Sequence[Utility]) -> None:
        """Raises BadParameter for no utility, or one within another."""
        if not utilities or any(isinstance(utility, Harmonic) for utility in utilities):
            raise BadParameter("utilities", [u.name for u in utilities], "at least one, none of them harmonic")
        self.utilities = tuple(utilities)
        self.smooth = all(utility.smooth for utility in utilities)
        counts = [utility.items for utility in utilities]
        self.items = sum(counts)
        order = sorted(((i + 0.5) / count, task, i) for task, count in enumerate(counts) for i in range(count))
        self._task = np.asarray([task for _, task, _ in order], dtype=np.int64)
        self._index = np.asarray([i for _, _, i in order], dtype=np.int64)

    def item(self, task: int, index: int) -> int:
        """Which item is example `index` of task `task`."""
        return int(np.flatnonzero((self._task == task) & (self._index == index))[0])

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> HarmonicScores:
        """See `Utility.evaluate`."""
        chosen = as_items(items, self.items)
        tasks, indices = self._task[chosen], self._index[chosen]
        values, weights = np.empty((len(mixtures), len(chosen))), np.empty(len(chosen))
        for task, utility in enumerate(self.utilities):
            columns = np.flatnonzero(tasks == task)
            if columns.size:
                scores = utility.evaluate(mixtures, indices[columns].tolist())
                values[:, columns], weights[columns] = scores.values, scores.weights
        logarithmic = tuple(utility.name == "loglikelihood" for utility in self.utilities)
        return HarmonicScores(values, weights, tasks=tasks, logarithmic=logarithmic)
