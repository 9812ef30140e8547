"""What the search maximises: a utility judges mixtures on examples, an evaluator runs it somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from token_swarm.particle import Mixture

Array: TypeAlias = npt.NDArray[np.float64]


class UtilityUnavailable(RuntimeError):
    """No mixture can be judged now: an endpoint does not answer, a budget is spent. It stops the search."""


@dataclass(frozen=True)
class Scores:
    """What mixtures got for single examples; higher is better.

    values: float64 [mixtures, items], NaN where a mixture failed; weights: float64 [items], what an example counts:
    its bytes for a likelihood (the values are nats), 1 for an accuracy. failures[m] says why mixture m failed.
    """

    values: Array
    weights: Array
    failures: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit, with ValueError."""
        if self.values.ndim != 2 or self.weights.shape != self.values.shape[1:]:
            raise ValueError(f"scores: values {self.values.shape} and weights {self.weights.shape} do not fit")
        if self.failures and len(self.failures) != len(self.values):
            raise ValueError(f"scores: {len(self.failures)} failures for {len(self.values)} mixtures")

    def utility(self) -> Array:
        """values.sum(1) / weights.sum(): float64 [mixtures], NaN for a mixture that failed."""
        return np.asarray(self.values.sum(axis=1) / self.weights.sum(), dtype=np.float64)

    def take(self, columns: Sequence[int] | npt.NDArray[np.int64]) -> Self:
        """The same mixtures on some of the items, each as often as it is named: a subset, or a resample."""
        chosen = np.asarray(columns, dtype=np.int64)
        return replace(self, values=self.values[:, chosen], weights=self.weights[chosen])

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of the mixtures of all `parts`, which were judged on the same items."""
        values = np.concatenate([part.values for part in parts])
        failures = tuple(f for part in parts for f in part.failures or (None,) * len(part.values))
        # A part in which everything failed knows nothing of the weights.
        told = next((part for part in parts if not np.isnan(part.values).all()), parts[0])
        return replace(told, values=values, failures=failures if any(failures) else ())


class Utility(Protocol):
    """Any function from a mixture to a number, one example at a time.

    `smooth`: differentiable in the weights, so that a final polish makes sense. `items`: number of examples.
    """

    @property
    def name(self) -> str:
        """What the artefact records, such as "loglikelihood"."""
        ...

    @property
    def smooth(self) -> bool:
        """Whether it is differentiable in the weights."""
        ...

    @property
    def items(self) -> int:
        """Number of examples."""
        ...

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """Judge every mixture on the examples `items` (None: on all).

        A NaN value marks a mixture that failed. Raises what only the user can mend: data, experts, an endpoint.
        """
        ...


class Evaluator(Protocol):
    """Runs a utility: here, in processes or on a cluster. The results are the same wherever it runs."""

    def evaluate(self, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """As `Utility.evaluate`; a mixture on which the utility raises gets NaN and a reason in `failures`."""
        ...


def as_items(items: Sequence[int] | None, count: int) -> npt.NDArray[np.int64]:
    """`items` as an index array, all of them for None. Raises IndexError outside 0 to count - 1."""
    chosen = np.arange(count) if items is None else np.asarray(items, dtype=np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= count):
        raise IndexError(f"items: {chosen.min()} to {chosen.max()}, the utility has 0 to {count - 1}")
    return chosen.astype(np.int64)
