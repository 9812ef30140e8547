"""The space that is searched: positions of an optimiser, and the mixtures they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Rule
from token_swarm.search.utility import Array

MAX_LOG_TEMPERATURE = math.log(16)
"""A temperature is searched between 1/16 and 16; beyond that a law is one-hot or uniform."""

_SNAP = 1e-12
"""A weight below this is rounding error around an exact zero, and an expert that would be run for nothing."""


@dataclass(frozen=True)
class Space:
    """Weights of named experts under a rule and, if asked for, a log-temperature of each.

    A position is float64 [dimension]: first the weights, in the order of `experts`, then the log-temperatures.
    Linear weights lie on the simplex (not negative, sum 1); log-linear weights are free.
    Raises BadParameter without experts, or for a name that stands twice.
    """

    experts: tuple[str, ...]
    rule: Rule = Rule.LOG_LINEAR
    temperatures: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no space."""
        if not self.experts or len(set(self.experts)) != len(self.experts):
            raise BadParameter("experts", list(self.experts), "at least one name, none of them twice")

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return len(self.experts) * (2 if self.temperatures else 1)

    @property
    def on_simplex(self) -> bool:
        """Whether the weights are bound to the simplex."""
        return self.rule.normalised

    @property
    def lower(self) -> Array:
        """Least value of every coordinate, -inf for free ones: [dimension]."""
        weights = np.full(len(self.experts), 0.0 if self.on_simplex else -np.inf)
        return self._with_temperatures(weights, -MAX_LOG_TEMPERATURE)

    @property
    def upper(self) -> Array:
        """Greatest value of every coordinate, inf for free ones: [dimension]."""
        return self._with_temperatures(np.full(len(self.experts), np.inf), MAX_LOG_TEMPERATURE)

    def project(self, positions: Array) -> Array:
        """The nearest positions of the space, Euclidean: [n, dimension] or [dimension].

        On the simplex a weight that the projection sets to 0 is exactly 0. A log-linear position without any
        weight defines no law and becomes the uniform one.
        """
        projected = np.array(positions, dtype=np.float64, ndmin=2)
        count = len(self.experts)
        if self.on_simplex:
            projected[:, :count] = project_to_simplex(projected[:, :count])
        else:
            nothing = ~projected[:, :count].any(axis=1)
            projected[nothing, :count] = 1 / count
        projected[:, count:] = np.clip(projected[:, count:], -MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE)
        return projected if np.ndim(positions) == 2 else projected[0]

    def one_hot(self) -> Array:
        """Every expert alone at temperature 1: [experts, dimension]."""
        return np.eye(len(self.experts), self.dimension)

    def uniform(self) -> Array:
        """Equal weights that sum to 1, temperature 1: [dimension]."""
        return self._with_temperatures(np.full(len(self.experts), 1 / len(self.experts)), 0.0)

    def mixture(self, position: Array) -> Mixture:
        """The mixing parameters that `position` ([dimension]) stands for. Raises BadParameter as Mixture does."""
        count = len(self.experts)
        weights = dict(zip(self.experts, position[:count].tolist(), strict=True))
        temperatures = dict(zip(self.experts, np.exp(position[count:]).tolist(), strict=False))
        return Mixture(weights, self.rule, temperatures)

    def mixtures(self, positions: Array) -> list[Mixture]:
        """`mixture` of every row."""
        return [self.mixture(position) for position in positions]

    def position(self, mixture: Mixture) -> Array:
        """The position of a mixture: [dimension]. Raises BadParameter for one outside of the space."""
        if mixture.rule is not self.rule:
            raise BadParameter("rule", mixture.rule.value, self.rule.value)
        for name in mixture.weights:
            if name not in self.experts:
                raise BadParameter("weights", name, f"one of the experts {list(self.experts)}")
        if not self.temperatures and any(value != 1 for value in mixture.temperatures.values()):
            raise BadParameter("temperatures", dict(mixture.temperatures), "1: this space has no temperatures")
        weights = np.array([mixture.weights.get(name, 0.0) for name in self.experts])
        logs = [math.log(mixture.temperatures.get(name, 1.0)) for name in self.experts if self.temperatures]
        if self.on_simplex:
            weights = weights / weights.sum()
        return np.concatenate([weights, np.array(logs)])

    def _with_temperatures(self, weights: Array, log_temperature: float) -> Array:
        return np.append(weights, np.full(self.dimension - len(self.experts), log_temperature))


def project_to_simplex(points: Array) -> Array:
    """The nearest points with coordinates >= 0 that sum to 1: [n, d].

    Duchi, Shalev-Shwartz, Singer, Chandra 2008, figure 1: subtract one threshold and cut at 0.
    """
    ordered = -np.sort(-points, axis=1)
    excess = np.cumsum(ordered, axis=1) - 1  # [n, d]: what the j+1 greatest have too much
    rank = np.arange(1, points.shape[1] + 1)
    kept: npt.NDArray[np.intp] = (ordered - excess / rank > 0).sum(axis=1)
    threshold = excess[np.arange(len(points)), kept - 1] / kept
    projected = np.maximum(points - threshold[:, None], 0.0)
    projected[projected < _SNAP] = 0.0
    return np.asarray(projected / projected.sum(axis=1, keepdims=True), dtype=np.float64)


def crossovers(parents: Array, count: int, random: np.random.Generator) -> Array:
    """`count` points t x_a + (1 - t) x_b of random pairs of `parents` ([n, d]), t ~ U(0, 1): [count, d]."""
    if len(parents) == 1:
        return np.repeat(parents, count, axis=0)
    t = random.random((count, 1))
    first = random.integers(len(parents), size=count)
    second = (first + random.integers(1, len(parents), size=count)) % len(parents)
    return np.asarray(t * parents[first] + (1 - t) * parents[second], dtype=np.float64)
