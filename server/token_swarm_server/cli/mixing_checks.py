"""How a request mixes, looked at before the experts of a configuration are loaded for it."""

from __future__ import annotations

from pathlib import Path

from token_swarm.errors import UnknownName
from token_swarm.particle import Rule
from token_swarm_server.cli import options
from token_swarm_server.config.loading import load_settings


def check_mixing(config: Path | None, weights: str | None, particle: str | None) -> None:
    """Find an expert or a particle that the configuration does not have; nothing without one.

    Raises UnknownName, BadParameter for a particle file that is broken, CliError and ConfigError.
    """
    if config is None or (weights is None and particle is None):
        return
    settings = load_settings(config)
    mixture = None if weights is None else options.parse_weights(weights, Rule.LOG_LINEAR)
    if particle is not None:
        from token_swarm_server.coordinator.particle_store import ParticleStore

        mixture = ParticleStore.load(settings.coordinator.particles).get(particle).mixture
    for name in mixture.active if mixture is not None else ():
        if name not in settings.experts:
            raise UnknownName("expert", name, settings.experts)
