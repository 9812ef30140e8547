"""The optimisers by name, each made from the same few arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
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

BASELINES = (CmaEs, NelderMead, DifferentialEvolution, RandomSearch)
OPTIMISERS = tuple(kind.name for kind in (ParticleSwarm, ModelSwarms, *BASELINES))
"""Names that `make_optimiser` knows; the first is the default."""


def make_optimiser(
    name: str, space: Space, settings: Mapping[str, Any], *, smooth: bool = False, seed: int = 0
) -> Optimiser:
    """The optimiser called `name` with `settings`: particles, iterations, and what else its settings class has.

    smooth: see Utility. Raises BadParameter for an unknown name, an unknown setting or a value it cannot have.
    """
    if name == ParticleSwarm.name:
        return ParticleSwarm(space, _settings(SwarmSettings, settings), smooth=smooth, seed=seed)
    if name == ModelSwarms.name:
        return ModelSwarms(space, _settings(ModelSwarmsSettings, settings), seed=seed)
    for kind in BASELINES:
        if name == kind.name:
            return kind(space, _settings(BaselineSettings, settings), seed=seed)
    raise BadParameter("optimiser", name, f"one of {list(OPTIMISERS)}")


def _settings(kind: Any, settings: Mapping[str, Any]) -> Any:
    known = [each.name for each in fields(kind)]
    for key in settings:
        if key not in known:
            raise BadParameter(key, settings[key], f"left out; this optimiser takes {known}")
    return kind(**settings)
