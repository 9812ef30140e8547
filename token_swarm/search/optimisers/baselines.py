"""Reference optimisers behind the ask/tell contract: CMA-ES, Nelder-Mead, differential evolution, random search.

They search unbounded coordinates. What is asked is the nearest position of the space; the squared distance to it is
taken off the utility, so that they do not drift away from where they are measured.
"""

from __future__ import annotations

import queue
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from scipy.optimize import differential_evolution, minimize

from token_swarm.errors import BadParameter
from token_swarm.search.optimisers.base import State, Tracking, require_count
from token_swarm.search.optimisers.space import Space, crossovers
from token_swarm.search.utility import Array

FAILED_LOSS = 1e100
"""What these methods are told instead of an infinite loss, with which they cannot calculate."""


@dataclass(frozen=True)
class BaselineSettings:
    """particles: positions asked at a time (1 for Nelder-Mead); iterations: particles x iterations is the budget."""

    particles: int = 20
    iterations: int = 50

    def __post_init__(self) -> None:
        """Refuse senseless values by name."""
        require_count("particles", self.particles, 1)
        require_count("iterations", self.iterations, 1)

    @property
    def evaluations(self) -> int:
        """The budget."""
        return self.particles * self.iterations


class Replayed(Tracking):
    """An optimiser whose library has no state to save: it is resumed by telling it again all it was told.

    `_raw` are the points that the library waits for, [n, dimension], None when it has ended.
    """

    def __init__(self, space: Space, settings: BaselineSettings | None = None, *, seed: int = 0) -> None:
        super().__init__(space, seed)
        self.settings = settings or BaselineSettings()
        self._seed = seed
        self._start_over()

    def _start_over(self) -> None:
        self.random = np.random.default_rng(self._seed)
        self._best = None
        self._told: list[Array] = []
        self._evaluations = 0
        self._asked = np.empty((0, self.space.dimension))
        self._raw: Array | None = None
        self._wait_for(self._begin())

    @abstractmethod
    def _begin(self) -> Array | None:
        """The first points."""

    @abstractmethod
    def _step(self, losses: Array) -> Array | None:
        """The next points, after the finite `losses`, [n], of the last."""

    @property
    def done(self) -> bool:
        """When the budget is used up or the method stops by itself."""
        return self._raw is None

    @property
    def population(self) -> Array:
        """The positions of the last batch."""
        return self._asked.copy()

    def ask(self) -> Array:
        """The nearest positions to the points that the library waits for."""
        return self._asked.copy()

    def _advance(self, utilities: Array) -> None:
        self._told.append(utilities)
        self._evaluations += len(utilities)
        if self._raw is None:
            raise RuntimeError("advanced after the end")
        distance = ((self._raw - self._asked) ** 2).sum(axis=1)
        losses = np.where(np.isfinite(utilities), distance - utilities, FAILED_LOSS)
        after = self._step(losses)
        self._wait_for(after if self._evaluations < self.settings.evaluations else None)

    def _wait_for(self, raw: Array | None) -> None:
        self._raw = raw
        if raw is not None:
            self._asked = self.space.project(raw)

    def state(self) -> State:
        """See Optimiser."""
        return {"told": [utilities.copy() for utilities in self._told]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Optimiser."""
        self._start_over()
        for utilities in state["told"]:
            self.tell(self.ask(), utilities)


class RandomSearch(Replayed):
    """Uniform on the simplex, or one-hot crossovers with normal noise of 0.5 for free weights."""

    name: ClassVar[str] = "random"

    def _begin(self) -> Array:
        return np.concatenate([self.space.uniform()[None], self._draw(self.settings.particles - 1)])

    def _step(self, losses: Array) -> Array:  # noqa: ARG002
        return self._draw(self.settings.particles)

    def _draw(self, count: int) -> Array:
        experts = len(self.space.experts)
        points = crossovers(self.space.one_hot(), count, self.random)
        if self.space.on_simplex:
            points[:, :experts] = self.random.dirichlet(np.ones(experts), count)
        else:
            points[:, :experts] += 0.5 * self.random.standard_normal((count, experts))
        points[:, experts:] = 0.5 * self.random.standard_normal((count, self.space.dimension - experts))
        return points


class CmaEs(Replayed):
    """CMA-ES (Hansen's pycma), from the uniform mixture with step 0.3."""

    name: ClassVar[str] = "cma"

    def _begin(self) -> Array:
        cma = _import_cma()
        random = np.random.default_rng([self._seed, 3])
        options = {
            "popsize": max(self.settings.particles, 2),
            "verbose": -9,
            "seed": np.nan,  # numpy's global generator is left alone: `randn` draws from ours
            "randn": lambda *shape: random.standard_normal(shape),
            "signals_filename": "",  # it would look for orders in the working directory
            "tolfun": 1e-14,
            "tolfunhist": 1e-14,
            "tolx": 1e-10,
        }
        self._cma = cma.CMAEvolutionStrategy(self.space.uniform(), 0.3, options)
        return self._points()

    def _step(self, losses: Array) -> Array | None:
        self._cma.tell(list(self._raw if self._raw is not None else ()), losses.tolist())
        return None if self._cma.stop() else self._points()

    def _points(self) -> Array:
        return np.asarray(self._cma.ask(), dtype=np.float64)


Search: TypeAlias = Callable[[Callable[[Array], Array]], None]
"""Minimises the loss it is given, [n, dimension] -> [n], and returns when it is at its end."""


class ScipySearch(Replayed):
    """A scipy minimiser, which calls its objective, turned around: it runs in a thread that waits for every loss."""

    _stop: Callable[[], object] | None = None

    @abstractmethod
    def _search(self) -> Search:
        """The minimiser. It must not refer to `self`, which the thread would keep alive."""

    def _begin(self) -> Array | None:
        points: queue.SimpleQueue[Array | BaseException | None] = queue.SimpleQueue()
        losses: queue.SimpleQueue[Array | None] = queue.SimpleQueue()
        self._points, self._losses = points, losses
        if self._stop is not None:
            self._stop()
        self._stop = weakref.finalize(self, losses.put, None)
        threading.Thread(target=_minimise, args=(self._search(), points, losses), daemon=True).start()
        return self._next()

    def _step(self, losses: Array) -> Array | None:
        self._losses.put(losses)
        return self._next()

    def _next(self) -> Array | None:
        points = self._points.get()
        if isinstance(points, BaseException):
            raise points
        return points


class _Abandoned(BaseException):
    """Ends the thread of a search that nobody will tell anything any more; no minimiser catches it."""


def _minimise(search: Search, points: queue.SimpleQueue[Any], losses: queue.SimpleQueue[Array | None]) -> None:
    def loss(batch: Array) -> Array:
        points.put(np.array(batch))
        told = losses.get()
        if told is None:
            raise _Abandoned
        return told

    try:
        search(loss)
        points.put(None)
    except _Abandoned:
        pass
    except BaseException as error:
        points.put(error)


class NelderMead(ScipySearch):
    """scipy's Nelder-Mead, one point at a time, from the uniform mixture."""

    name: ClassVar[str] = "nelder-mead"

    def _search(self) -> Search:
        start, budget = self.space.uniform(), self.settings.evaluations
        simplex = np.concatenate([start[None], start + 0.3 * np.eye(len(start))])

        def search(loss: Callable[[Array], Array]) -> None:
            options = {"maxfev": budget, "xatol": 1e-10, "fatol": 1e-14, "initial_simplex": simplex}
            minimize(lambda point: float(loss(point[None])[0]), start, method="Nelder-Mead", options=options)

        return search


class DifferentialEvolution(ScipySearch):
    """scipy's differential evolution with weights in [0, 1] on the simplex, in [-1, 2] where they are free."""

    name: ClassVar[str] = "differential-evolution"

    def _search(self) -> Search:
        space, given = self.space, self.settings
        if given.particles < 5:
            raise BadParameter("particles", given.particles, "at least 5 for differential evolution")
        random = np.random.default_rng([self._seed, 4])
        free = [(0.0, 1.0) if space.on_simplex else (-1.0, 2.0)] * len(space.experts)
        bounds = free + [(-1.0, 1.0)] * (space.dimension - len(space.experts))
        low, high = np.array(bounds).T
        start = low + (high - low) * random.random((given.particles, space.dimension))
        start[0] = space.uniform()

        def search(loss: Callable[[Array], Array]) -> None:
            differential_evolution(
                lambda points: loss(points.T),
                bounds,
                maxiter=given.iterations - 1,
                init=start,
                rng=random,
                tol=0.0,
                polish=False,
                vectorized=True,
                updating="deferred",
            )

        return search


def _import_cma() -> Any:
    try:
        import cma
    except ImportError as error:
        raise BadParameter("optimiser", "cma", "installed: pip install 'token-swarm[search]'") from error
    return cma
