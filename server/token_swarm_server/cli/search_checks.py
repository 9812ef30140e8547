"""What `token-swarm search` needs at its end, looked at before its beginning: before any model is loaded."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from token_swarm_server.cli.errors import FAILURE, CliError

if TYPE_CHECKING:
    from token_swarm.search.optimisers.space import Space
    from token_swarm.search.run.run import SearchConfig

_INSTALL = "pip install 'token-swarm[search]'"


def check_parts(optimisers: Sequence[str], *, report: bool) -> None:
    """Refuse to start without the packages that the report or an optimiser need. Raises CliError."""
    if report and importlib.util.find_spec("matplotlib") is None:
        raise CliError(f"--report: the report needs matplotlib: {_INSTALL}; or leave it out: --no-report", FAILURE)
    if "cma" in optimisers and importlib.util.find_spec("cma") is None:
        raise CliError(f"--optimiser/--reference: cma is not installed: {_INSTALL}; or leave it out", FAILURE)


def check_folders(out: Path, particles: Path | None, name: str) -> None:
    """Refuse a name that is no file's, and folders in which nothing can be written or no server would start.

    Makes the folders. Raises CliError, and BadParameter for a particle file that is broken.
    """
    from token_swarm.particle import Particle

    plain = name == name.strip() and name.isprintable() and not set(name) & set("/\\")
    if not name or not plain or name.startswith((".", "-")):
        raise CliError(f"--name: {name!r} is no name of a particle; allowed: what can name a file, such as code")
    _require_writable("--out", out)
    if particles is None:
        return
    _require_writable("--particles", particles)
    for path in sorted(particles.glob("*.json")):
        if path.name == f"{name}.json":
            continue  # it is replaced
        try:
            other = Particle.load(path)
        except (OSError, UnicodeDecodeError) as error:
            raise CliError(f"--particles: {path} cannot be read: {error}") from error
        if other.name == name:
            raise CliError(f"--name: {name!r} is the name of {path} already; a server would refuse two of one name")


def check_optimisers(config: SearchConfig, references: Sequence[str], space: Space) -> None:
    """Refuse settings that an optimiser cannot have. Raises BadParameter."""
    from token_swarm.search.optimisers.registry import make_optimiser
    from token_swarm.search.run.racing import Race

    make_optimiser(config.optimiser, space, config.settings, seed=config.seed)
    for name in references:
        budget = {key: config.settings[key] for key in ("particles", "iterations")}
        make_optimiser(name, space, budget, seed=config.seed)
    if config.race is not None:
        Race(config.race, 1, config.seed)


def _require_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CliError(f"{option}: {folder} cannot be written: {error.strerror}", FAILURE) from error
