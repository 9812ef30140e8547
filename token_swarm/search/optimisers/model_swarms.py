"""Model Swarms (Feng et al., arXiv 2410.11163), carried from the weights of models to the weights of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from token_swarm.errors import BadParameter
from token_swarm.search.optimisers.base import State, Swarm, put, require_count, taken
from token_swarm.search.optimisers.space import Space, crossovers
from token_swarm.search.utility import Array

_START_LOG_TEMPERATURE = 0.3
"""Spread of the crossovers' log-temperatures. The paper has none; without a spread no velocity ever has one."""


@dataclass(frozen=True)
class ModelSwarmsSettings:
    """The paper's hyperparameters, with its defaults. Raises BadParameter for values it gives no meaning to."""

    particles: int = 20  # N
    iterations: int = 50  # K, the start counted: as many batches are evaluated
    inertia: float = 0.4  # φ_v
    cognitive: float = 0.3  # φ_p
    social: float = 0.3  # φ_g
    repel: float = 0.3  # φ_w
    step: float = 1.0  # λ
    step_decay: float = 0.95  # φ_λ
    min_step: float = 0.1
    patience: int = 10
    restart: int = 5
    dropout_k: float = 0.0
    """Probability that a whole iteration is not evaluated; its particles keep their last utilities."""
    dropout_n: float = 0.0
    """Probability that a particle is not evaluated in an iteration."""

    def __post_init__(self) -> None:
        """Refuse senseless values by name."""
        for name, least in (("particles", 1), ("iterations", 1), ("patience", 1), ("restart", 1)):
            require_count(name, getattr(self, name), least)
        for name in ("inertia", "cognitive", "social", "repel", "min_step"):
            if not 0 <= getattr(self, name) < np.inf:
                raise BadParameter(name, getattr(self, name), "a finite number >= 0")
        if self.inertia + self.cognitive + self.social + self.repel == 0:
            raise BadParameter("inertia", self.inertia, "above 0 when the three other coefficients are 0")
        for name in ("dropout_k", "dropout_n"):
            if not 0 <= getattr(self, name) < 1:
                raise BadParameter(name, getattr(self, name), "a probability below 1")
        for name, most in (("step", np.inf), ("step_decay", 1)):
            if not 0 < getattr(self, name) <= most:
                raise BadParameter(name, getattr(self, name), f"above 0 and at most {most}")


class ModelSwarms(Swarm):
    """The paper's algorithm 1:

        v_i <- [r_v φ_v v_i + r_p φ_p (p_i - x_i) + r_g φ_g (g - x_i) - r_w φ_w (g_w - x_i)] / C
        x_i <- x_i + λ v_i,   λ <- max(φ_λ λ, floor)

    with scalars r ~ U(0, 1) drawn for each particle, C = r_v φ_v + r_p φ_p + r_g φ_g + r_w φ_w, p_i the personal best,
    g and g_w the best and the worst of all particles and times. The swarm starts as the single experts and crossovers
    t x_a + (1 - t) x_b of pairs of them, with velocities x_j - x_i towards another particle. A particle whose personal
    best is `restart` iterations old goes back to it with velocity 0, as in the authors' code in every iteration until
    it improves; `patience` iterations without a better global best end the search.

    What a law over tokens adds: linear weights that leave the simplex are projected back onto it.
    Under the log-linear rule every point of such a swarm keeps the weights' sum of 1.
    """

    name: ClassVar[str] = "model-swarms"

    def __init__(self, space: Space, settings: ModelSwarmsSettings | None = None, *, seed: int = 0) -> None:
        """Raises BadParameter when there are fewer particles than experts."""
        self.settings = settings = settings or ModelSwarmsSettings()
        random = np.random.default_rng([seed, 1])
        start = _start(space, settings.particles, random)
        super().__init__(space, start, _velocities(start, random), seed)
        self._step = settings.step
        self._last = np.full(len(start), -np.inf)  # what a particle that is dropped keeps
        self._worst = start[0].copy()
        self._worst_utility = np.inf
        self._asked = np.arange(len(start))  # particles of this iteration that are evaluated
        self._ended = False

    @property
    def done(self) -> bool:
        """After K iterations, or when patience is at its end."""
        return self._ended

    def ask(self) -> Array:
        """The particles that are evaluated: all of them unless some are dropped."""
        return self.x[self._asked]

    def _advance(self, utilities: Array) -> None:
        now = self._last.copy()
        now[self._asked] = utilities
        while True:
            self._conclude(now)
            if self._ended:
                return
            self._move()
            self._asked = self._choose_evaluated()
            if len(self._asked):
                return
            now = self._last  # a dropped iteration: nothing is measured, everything else happens

    def _conclude(self, utilities: Array) -> None:
        """End an iteration in which the particles have `utilities`, [particles]."""
        fresh = np.full(len(utilities), -np.inf)
        fresh[self._asked] = utilities[self._asked]
        self.remember(fresh)
        if len(self._asked):
            worst = self._asked[int(np.argmin(utilities[self._asked]))]
            if utilities[worst] < self._worst_utility:
                self._worst, self._worst_utility = self.x[worst].copy(), float(utilities[worst])
        self._last = utilities
        # The starting particles are the first iteration: they are evaluated, not moved.
        self.iteration += 1
        self._ended = self.iteration >= self.settings.iterations or self.stale_iterations >= self.settings.patience

    def _move(self) -> None:
        given = self.settings
        stray = self.stale >= given.restart
        self.x = np.where(stray[:, None], self.personal, self.x)
        self.v = np.where(stray[:, None], 0.0, self.v)
        phi = np.array([given.inertia, given.cognitive, given.social, given.repel])
        # 1 - U keeps 0 out, so that C is never 0.
        pull = (1 - self.random.random((len(self.x), 4))) * phi
        pull /= pull.sum(axis=1, keepdims=True)
        best = self.personal[int(np.argmax(self.personal_utility))]
        towards = np.stack([self.v, self.personal - self.x, best - self.x, self.x - self._worst], axis=1)
        self.v = (pull[:, :, None] * towards).sum(axis=1)
        self.x = self.space.project(self.x + self._step * self.v)
        self._step = max(given.step_decay * self._step, given.min_step)

    def _choose_evaluated(self) -> Any:
        drop_all = self.random.random() < self.settings.dropout_k
        dropped = self.random.random(len(self.x)) < self.settings.dropout_n
        return np.flatnonzero(~(dropped | drop_all))

    def state(self) -> State:
        """See Optimiser."""
        return {**self._swarm_state(), **taken(self, _FIELDS)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Optimiser."""
        self._restore_swarm(state)
        put(self, _FIELDS, state)


_FIELDS = ("_step", "_last", "_worst", "_worst_utility", "_asked", "_ended")


def _start(space: Space, particles: int, random: np.random.Generator) -> Array:
    experts = space.one_hot()
    if particles < len(experts):
        raise BadParameter("particles", particles, f"at least {len(experts)}, one for each expert")
    children = crossovers(experts, particles - len(experts), random)
    count = len(space.experts)
    children[:, count:] += _START_LOG_TEMPERATURE * random.standard_normal(children[:, count:].shape)
    return space.project(np.concatenate([experts, children]))


def _velocities(start: Array, random: np.random.Generator) -> Array:
    if len(start) == 1:
        return np.zeros_like(start)
    others = (np.arange(len(start)) + random.integers(1, len(start), size=len(start))) % len(start)
    return np.asarray(start[others] - start, dtype=np.float64)
