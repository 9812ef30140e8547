"""The particles a coordinator offers by name: the JSON files of one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from token_swarm.errors import BadParameter, UnknownName
from token_swarm.particle import Particle


class ParticleStore:
    """Particles by name."""

    def __init__(self, particles: Mapping[str, Particle]) -> None:
        self._particles = dict(particles)

    @classmethod
    def load(cls, folder: Path | None) -> ParticleStore:
        """Read every `*.json` of `folder`; None is an empty store.

        Raises BadParameter when the folder is missing, a file is no particle, or two files have one name.
        """
        if folder is None:
            return cls({})
        if not folder.is_dir():
            raise BadParameter("coordinator.particles", str(folder), "an existing folder of particle JSON files")
        particles: dict[str, Particle] = {}
        for path in sorted(folder.glob("*.json")):
            particle = Particle.load(path)
            if particle.name in particles:
                raise BadParameter(f"{path.name}: name", particle.name, "a name that no other file of the folder has")
            particles[particle.name] = particle
        return cls(particles)

    def get(self, name: str) -> Particle:
        """The particle called `name`. Raises UnknownName."""
        try:
            return self._particles[name]
        except KeyError:
            raise UnknownName("particle", name, self._particles) from None

    def all(self) -> list[Particle]:
        """Every particle, by name."""
        return [self._particles[name] for name in sorted(self._particles)]
