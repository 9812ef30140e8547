"""`token-swarm particles`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm.particle import Particle
from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import CliError

if TYPE_CHECKING:
    from rich.table import Table

    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

particles = typer.Typer(rich_markup_mode=None)


@particles.callback(invoke_without_command=True)
def list_particles(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Option("--dir", help="List this folder instead of a server's.")] = None,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    as_json: options.Json = False,
) -> None:
    """List named mixtures.

    Those of a running server, or of a folder.

    \b
    Examples:
      token-swarm particles
      token-swarm particles --dir examples/particles
      token-swarm particles show examples/particles/uniform.json
      token-swarm particles compare runs/code/particle.json runs/prose/particle.json
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from token_swarm_server.cli.client import plain
    from token_swarm_server.cli.report import particles_table

    if folder is not None:
        listed = _of_folder(folder)
    else:
        credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
        listed = session.with_server(address, None, _of_server, credentials)
    if as_json:
        print(json.dumps(plain(listed)))
    else:
        Console().print(particles_table(listed.particles))


@particles.command()
def show(file: Annotated[Path, typer.Argument(help="A particle's JSON file.")]) -> None:
    """Check a particle's file and print what it says."""
    print(_load(file).to_json(), end="")


@particles.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Two or more particles' JSON files.")],
    as_json: options.Json = False,
) -> None:
    """Put particles side by side.

    Their weights, what they were learned for, and their scores. Weights of the linear rule are shown as shares.

    \b
    Example:
      token-swarm particles compare runs/code/particle.json runs/prose/particle.json
    """
    if len(files) < 2:
        raise CliError("FILES: give two or more particles' files; `particles show` prints one")
    loaded = [_load(file) for file in files]
    if as_json:
        print(json.dumps({"particles": [json.loads(each.to_json()) for each in loaded], "notes": _notes(loaded)}))
        return
    from rich.console import Console

    console = Console()
    console.print(_side_by_side(loaded))
    for note in _notes(loaded):
        console.print(note, highlight=False, soft_wrap=True)


def _side_by_side(loaded: list[Particle]) -> Table:
    from token_swarm_server.cli.report import plain_table

    table = plain_table("", *(each.name for each in loaded), texts=[each.name for each in loaded])

    def row(head: str, cells: Iterable[object]) -> None:
        table.add_row(head, *("-" if cell is None else str(cell) for cell in cells))

    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:.6g}"

    row("rule", (each.mixture.rule.value for each in loaded))
    for name in dict.fromkeys(name for each in loaded for name in each.mixture.weights):
        row(name, (number(_weight(each, name)) for each in loaded))
        heats = [each.mixture.temperatures.get(name, 1.0) for each in loaded]
        if any(heat != 1 for heat in heats):
            row(f"{name} temperature", map(number, heats))
    row("utility", (each.utility for each in loaded))
    row("data", (each.data_hash and each.data_hash[:12] for each in loaded))
    row("dev", (number(each.dev_score) for each in loaded))
    row("test", (number(each.test_score) for each in loaded))
    row("seed", (each.seed for each in loaded))
    return table


def _weight(particle: Particle, name: str) -> float | None:
    """The weight of an expert as it acts: linear weights are divided by their sum."""
    weight = particle.mixture.weights.get(name)
    if weight is None or not particle.mixture.rule.normalised:
        return weight
    return weight / sum(particle.mixture.weights.values())


def _notes(loaded: list[Particle]) -> list[str]:
    """What keeps the particles from being compared number by number."""
    notes = []
    if len({(each.utility, each.data_hash) for each in loaded}) > 1:
        notes.append("scores are of different utilities or data: they cannot be compared with one another")
    for name in sorted({name for each in loaded for name in each.fingerprints}):
        marks = {each.fingerprints[name] for each in loaded if name in each.fingerprints}
        if len(marks) > 1:
            notes.append(f"expert {name} is not the same one in all of them: {len(marks)} fingerprints")
    return notes


def _load(file: Path) -> Particle:
    """The particle in `file`. Raises CliError when it cannot be read, BadParameter when it is none."""
    try:
        return Particle.load(file)
    except OSError as error:
        raise CliError(f"FILE: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"FILE: {file} is not valid UTF-8 at byte {error.start}") from error


async def _of_server(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> Any:
    from token_swarm.v1 import swarm_pb2

    return await stub.ListParticles(swarm_pb2.ListParticlesRequest())


def _of_folder(folder: Path) -> swarm_pb2.ListParticlesResponse:
    from token_swarm_server.coordinator.messages import particles_to_proto
    from token_swarm_server.coordinator.particle_store import ParticleStore

    return particles_to_proto(ParticleStore.load(folder).all())
