"""The ask/tell contract. An optimiser proposes positions and is told their utility; it never calls the utility."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np

from token_swarm.errors import BadParameter
from token_swarm.search.optimisers.space import Space
from token_swarm.search.utility import Array

State: TypeAlias = dict[str, Any]
"""What an optimiser needs to go on: JSON values, numpy arrays, and dicts and lists of them."""


class Best(NamedTuple):
    """The best position that was evaluated, [dimension], and its utility."""

    position: Array
    utility: float


class Optimiser(Protocol):
    """Maximises a utility over a space.

        while not optimiser.done:
            positions = optimiser.ask()                    # [n, dimension], each of them in the space
            optimiser.tell(positions, judge(positions))    # [n], NaN for a particle that failed

    Equal seeds and equal utilities give equal positions, to the bit. `state` after a `tell` and `restore` on a new
    optimiser that was made with the same arguments go on as if nothing had happened.
    """

    name: ClassVar[str]

    @property
    def best(self) -> Best | None:
        """The best told position, the first of equals; None while none has a finite utility."""
        ...

    @property
    def done(self) -> bool:
        """Whether the search has ended; then there is nothing to ask."""
        ...

    @property
    def population(self) -> Array:
        """The particles as they stand, [n, dimension]: personal bests where the method has them."""
        ...

    def ask(self) -> Array:
        """The positions to evaluate next, [n, dimension]. Asking again before telling gives the same."""
        ...

    def tell(self, positions: Array, utilities: Array) -> None:
        """Take the utilities, [n], of the positions that were asked. Raises ValueError for others."""
        ...

    def state(self) -> State:
        """Everything that `restore` needs."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the search where `state` was made."""
        ...


class Tracking(ABC):
    """What all optimisers share: the best so far, the check of what is told, NaN counted as the worst."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.random = np.random.default_rng(seed)
        self._best: Best | None = None

    @property
    def best(self) -> Best | None:
        """See Optimiser."""
        return self._best

    @property
    @abstractmethod
    def done(self) -> bool:
        """See Optimiser."""

    @abstractmethod
    def ask(self) -> Array:
        """See Optimiser."""

    @abstractmethod
    def _advance(self, utilities: Array) -> None:
        """Take the utilities, none of them NaN, and prepare the next positions."""

    def tell(self, positions: Array, utilities: Array) -> None:
        """See Optimiser."""
        utilities = np.asarray(utilities, dtype=np.float64)
        if self.done or not np.array_equal(positions, self.ask()) or utilities.shape != (len(positions),):
            raise ValueError("tell: not one utility for each of the positions that were asked")
        utilities = np.where(np.isnan(utilities), -np.inf, utilities)
        leader = int(np.argmax(utilities))
        if utilities[leader] > (self._best.utility if self._best else -np.inf):
            self._best = Best(np.array(positions[leader]), float(utilities[leader]))
        self._advance(utilities)

    def _shared_state(self) -> State:
        best = None if self._best is None else copy.deepcopy(self._best._asdict())
        return {"random": self.random.bit_generator.state, "best": best}

    def _restore_shared(self, state: Mapping[str, Any]) -> None:
        self.random.bit_generator.state = state["random"]
        best = state["best"]
        self._best = None if best is None else Best(**copy.deepcopy(best))


class Swarm(Tracking):
    """Particles with a velocity and a memory: the bookkeeping of both swarms."""

    def __init__(self, space: Space, start: Array, velocity: Array, seed: Any) -> None:
        """start: [particles, dimension] inside the space; velocity: the same shape."""
        super().__init__(space, seed)
        self.x = start
        self.v = velocity
        self.personal = start.copy()
        self.personal_utility = np.full(len(start), -np.inf)
        self.stale = np.zeros(len(start), dtype=np.int64)  # iterations since a particle's personal best
        self.iteration = 0
        self.stale_iterations = 0  # since the global best

    @property
    def population(self) -> Array:
        """Personal bests."""
        return self.personal.copy()

    def remember(self, utilities: Array) -> None:
        """Update the personal bests and the counts of stale iterations with the utilities of `x`, [particles]."""
        better = utilities > self.personal_utility
        improved = utilities.max() > self.personal_utility.max()
        self.personal[better] = self.x[better]
        self.personal_utility[better] = utilities[better]
        self.stale = np.where(better, 0, self.stale + 1)
        self.stale_iterations = 0 if improved else self.stale_iterations + 1

    def _swarm_state(self) -> State:
        return {**self._shared_state(), **taken(self, _SWARM_FIELDS)}

    def _restore_swarm(self, state: Mapping[str, Any]) -> None:
        self._restore_shared(state)
        put(self, _SWARM_FIELDS, state)


_SWARM_FIELDS = ("x", "v", "personal", "personal_utility", "stale", "iteration", "stale_iterations")


def require_count(field: str, value: int, least: int) -> None:
    """Raise BadParameter unless `value` is a whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadParameter(field, value, f"a whole number of at least {least}")


def taken(owner: object, fields: Iterable[str]) -> State:
    """Copies of the attributes `fields` of `owner`."""
    return {name: copy.deepcopy(getattr(owner, name)) for name in fields}


def put(owner: object, fields: Iterable[str], state: Mapping[str, Any]) -> None:
    """The reverse of `taken`."""
    for name in fields:
        setattr(owner, name, copy.deepcopy(state[name]))
