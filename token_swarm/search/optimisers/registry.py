"""The optimisers by name, each made from the same few arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from token_swarm.errors import BadParameter
from token_swarm.search.optimisers.base import Optimiser
from token_swarm.search.optimisers.baselines import (
    BaselineSettings,
    CmaEs,
    DifferentialEvolution,
    NelderMead,
    RandomSearch,
)
from token_swarm.search.optimisers.model_swarms import ModelSwarms, ModelSwarmsSettings
from token_swarm.search.optimisers.particle_swarm import ParticleSwarm, SwarmSettings
from token_swarm.search.optimisers.space import Space


@dataclass(frozen=True)
class OptimiserKind:
    """An optimiser and the dataclass of its settings, which has `particles` and `iterations` among them.

    It is made as optimiser(space, settings, seed=...). polishes: it also takes `smooth`, see `Utility`.
    """

    optimiser: Callable[..., Optimiser]
    settings: type
    polishes: bool = False


_KINDS = {
    "swarm": OptimiserKind(ParticleSwarm, SwarmSettings, polishes=True),
    "model-swarms": OptimiserKind(ModelSwarms, ModelSwarmsSettings),
    "cma": OptimiserKind(CmaEs, BaselineSettings),
    "nelder-mead": OptimiserKind(NelderMead, BaselineSettings),
    "differential-evolution": OptimiserKind(DifferentialEvolution, BaselineSettings),
    "random": OptimiserKind(RandomSearch, BaselineSettings),
}
OPTIMISERS = tuple(_KINDS)
"""Names that `make_optimiser` knows; the first is the default."""


def make_optimiser(
    name: str, space: Space, settings: Mapping[str, Any], *, smooth: bool = False, seed: int = 0
) -> Optimiser:
    """The optimiser called `name` with `settings`: particles, iterations, and what else its settings class has.

    smooth: see Utility. Raises BadParameter for an unknown name, an unknown setting or a value it cannot have.
    """
    if name not in _KINDS:
        raise BadParameter("optimiser", name, f"one of {list(OPTIMISERS)}")
    kind = _KINDS[name]
    more = {"smooth": smooth} if kind.polishes else {}
    return kind.optimiser(space, _settings(kind.settings, settings), seed=seed, **more)


def _settings(kind: Any, settings: Mapping[str, Any]) -> Any:
    known = [each.name for each in fields(kind)]
    for key in settings:
        if key not in known:
            raise BadParameter(key, settings[key], f"left out; this optimiser takes {known}")
    return kind(**settings)
