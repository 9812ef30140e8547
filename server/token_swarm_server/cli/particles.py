"""`token-swarm particles`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm.particle import Particle
from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import CliError

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

particles = typer.Typer(rich_markup_mode=None)


@particles.callback(invoke_without_command=True)
def list_particles(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="List this folder instead of a server's.")
    ] = None,
    address: options.Address = None,
    as_json: options.Json = False,
) -> None:
    """List named mixtures.

    Those of a running server, or of a folder.

    \b
    Examples:
      token-swarm particles
      token-swarm particles --dir examples/particles
      token-swarm particles show examples/particles/uniform.json
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from token_swarm_server.cli.client import plain
    from token_swarm_server.cli.report import particles_table

    listed = _of_folder(folder) if folder is not None else session.with_server(address, None, _of_server)
    if as_json:
        print(json.dumps(plain(listed)))
    else:
        Console().print(particles_table(listed.particles))


@particles.command()
def show(file: Annotated[Path, typer.Argument(help="A particle's JSON file.")]) -> None:
    """Check a particle's file and print what it says."""
    try:
        particle = Particle.load(file)
    except OSError as error:
        raise CliError(f"FILE: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"FILE: {file} is not valid UTF-8 at byte {error.start}") from error
    print(particle.to_json(), end="")


async def _of_server(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> Any:
    from token_swarm.v1 import swarm_pb2

    return await stub.ListParticles(swarm_pb2.ListParticlesRequest())


def _of_folder(folder: Path) -> swarm_pb2.ListParticlesResponse:
    from token_swarm_server.particle_store import ParticleStore
    from token_swarm_server.public_wire import particles_to_proto

    return particles_to_proto(ParticleStore.load(folder).all())
