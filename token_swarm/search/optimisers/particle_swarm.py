"""The default search: a particle swarm that finds the hill, and Newton steps that find its top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from token_swarm.errors import BadParameter
from token_swarm.search.optimisers.base import Best, State, Swarm, put, require_count, taken
from token_swarm.search.optimisers.polish import Polish
from token_swarm.search.optimisers.space import Space, crossovers
from token_swarm.search.utility import Array


@dataclass(frozen=True)
class SwarmSettings:
    """Defaults are Clerc and Kennedy's constricted swarm (2002). Raises BadParameter for senseless values."""

    particles: int = 20
    iterations: int = 50
    """Most batches that are evaluated, the start and the polish among them."""
    inertia: float = 0.7298
    cognitive: float = 1.49618
    social: float = 1.49618
    patience: int = 10
    """Iterations without a better global best that end the swarm."""
    spread: float = 0.1
    """On a smooth utility, the swarm hands over to the polish when the better half of its personal bests is this close
    together, or when half of the iterations are used up."""
    rounds: int = 20
    """Most rounds of the polish, two iterations each, on a smooth utility; 0 leaves it out."""

    def __post_init__(self) -> None:
        """Refuse senseless values by name."""
        for name, least in (("particles", 1), ("iterations", 1), ("patience", 1), ("rounds", 0)):
            require_count(name, getattr(self, name), least)
        for name in ("inertia", "cognitive", "social", "spread"):
            if not 0 <= getattr(self, name) < np.inf:
                raise BadParameter(name, getattr(self, name), "a finite number >= 0")


class ParticleSwarm(Swarm):
    """Particle swarm with random numbers for every coordinate, then a polish if the utility is smooth.

        v <- ω v + c_p r_p (p - x) + c_g r_g (g - x),   x <- the space's nearest point to x + v

    r ~ U(0, 1) for each particle and coordinate. A scalar r, as Model Swarms has it, can only move inside the plane of
    four points; a vector leaves it. A particle that the projection stops at a bound loses its velocity there.
    """

    name: ClassVar[str] = "swarm"

    def __init__(
        self, space: Space, settings: SwarmSettings | None = None, *, smooth: bool = False, seed: int = 0
    ) -> None:
        """smooth: see Utility. Raises BadParameter when there are fewer particles than experts."""
        self.settings = settings = settings or SwarmSettings()
        random = np.random.default_rng([seed, 2])
        start = _start(space, settings.particles, random)
        others = random.permutation(len(start))
        super().__init__(space, start, (start[others] - start) / 2, seed)
        self._smooth = smooth and settings.rounds > 0
        self._polish: Polish | None = None
        self._ended = False

    @property
    def done(self) -> bool:
        """When the polish has reached the top; without one, when iterations or patience are at their end."""
        return self._ended

    def ask(self) -> Array:
        """The swarm, and later what the polish asks."""
        return self._polish.ask() if self._polish else self.x.copy()

    def _advance(self, utilities: Array) -> None:
        if self._polish is not None:
            self._polish.tell(utilities)
            # The particle that the polish took on stays in the population, at its new place.
            leader = int(np.argmax(self.personal_utility))
            self.personal[leader], self.personal_utility[leader] = self._polish.centre, self._polish.utility
            self._ended = self._polish.done
            return
        self.remember(utilities)
        given = self.settings
        self.iteration += 1
        limit = (given.iterations + 1) // 2 if self._smooth else given.iterations
        last = self.iteration >= limit or self.stale_iterations >= given.patience
        if last or (self._smooth and self._gathered()):
            best = self.best
            if self._smooth and best is not None:
                affordable = (given.iterations - self.iteration) // 2
                self._polish = Polish(self.space, best, min(given.rounds, affordable))
            self._ended = self._polish is None or self._polish.done
            return
        self._move()

    def _gathered(self) -> bool:
        """Whether the better half of the personal bests is within `spread` of the best one in every coordinate."""
        order = np.argsort(-self.personal_utility, kind="stable")
        half = self.personal[order[: (len(order) + 1) // 2]]
        return bool(np.abs(half - half[0]).max() <= self.settings.spread)

    def _move(self) -> None:
        given = self.settings
        best = self.personal[int(np.argmax(self.personal_utility))]
        r = self.random.random((2, *self.x.shape))
        self.v = (
            given.inertia * self.v
            + given.cognitive * r[0] * (self.personal - self.x)
            + given.social * r[1] * (best - self.x)
        )
        moved = self.space.project(self.x + self.v)
        stopped = ((moved <= self.space.lower) & (self.v < 0)) | ((moved >= self.space.upper) & (self.v > 0))
        self.v = np.where(stopped, 0.0, self.v)
        self.x = moved

    def state(self) -> State:
        """See Optimiser."""
        polish = None if self._polish is None else self._polish.state()
        return {**self._swarm_state(), **taken(self, _FIELDS), "polish": polish}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Optimiser."""
        self._restore_swarm(state)
        put(self, _FIELDS, state)
        self._polish = None
        if state["polish"] is not None:
            self._polish = Polish(self.space, Best(self.x[0], 0.0), 0)
            self._polish.restore(state["polish"])


_FIELDS = ("_ended",)


def _start(space: Space, particles: int, random: np.random.Generator) -> Array:
    """Every expert alone, all of them equally, and random mixtures; free weights are scattered around those."""
    known = np.concatenate([space.one_hot(), space.uniform()[None]])[: max(particles, len(space.experts))]
    if particles < len(space.experts):
        raise BadParameter("particles", particles, f"at least {len(space.experts)}, one for each expert")
    count, experts = particles - len(known), len(space.experts)
    scattered = crossovers(space.one_hot(), count, random)
    if space.on_simplex:
        scattered[:, :experts] = random.dirichlet(np.ones(experts), count)
    else:
        scattered[:, :experts] += 0.3 * random.standard_normal((count, experts))
    scattered[:, experts:] = 0.3 * random.standard_normal((count, space.dimension - experts))
    return space.project(np.concatenate([known, scattered]))
