"""`token-swarm serve`."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm_server.cli import session
from token_swarm_server.cli.errors import CliError
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.places import DEMO_CONFIG
from token_swarm_server.config.settings import Settings
from token_swarm_server.telemetry import logs
from token_swarm_server.telemetry.logs import LogFormat, LogLevel

if TYPE_CHECKING:
    from rich.console import Console


def serve(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file that names the experts; default: the two demo experts.", metavar="FILE"),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port or unix:/path, instead of the file's.")
    ] = None,
    allow_insecure: Annotated[
        bool,
        typer.Option("--allow-insecure", help="Let other machines in without encryption, or without asking who calls."),
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="Lines for people, or one JSON object each.")] = LogFormat.TEXT,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is logged; info has requests.")] = LogLevel.INFO,
) -> None:
    """Serve the experts of a configuration as one model.

    Starts their processes and runs until Ctrl-C or SIGTERM.

    \b
    Example:
      token-swarm serve
      token-swarm serve --config examples/three.yaml
      TOKEN_SWARM_COORDINATOR__EPSILON=0.001 token-swarm serve
    `token-swarm examples` writes examples/.
    """
    from token_swarm_server.coordinator.particle_store import ParticleStore
    from token_swarm_server.launch.allocator import give_back_large_blocks
    from token_swarm_server.rpc.host import public_access

    give_back_large_blocks()
    given = ({"listen": listen} if listen else {}) | ({"allow_insecure": True} if allow_insecure else {})
    settings = load_settings(config or DEMO_CONFIG, **({"coordinator": given} if given else {}))
    logs.configure(log_format, log_level)
    require_free(settings.coordinator.listen, "coordinator.listen")
    if settings.coordinator.metrics.listen is not None:
        require_free(settings.coordinator.metrics.listen, "coordinator.metrics.listen")
    # Before minutes of loading.
    public_access(settings.coordinator).require_usable(settings.coordinator.listen, "coordinator.listen")
    ParticleStore.load(settings.coordinator.particles)
    console = _log_console() if log_format is LogFormat.JSON else session.stderr_console()
    models = session.ready_models(settings, console)
    session.run(_serve(settings, models, console, table=log_format is LogFormat.TEXT))


def _log_console() -> Console:
    """A console for a machine that reads standard error: every line is one of the log."""
    from rich.console import Console

    return Console(file=logs.LineLog(), width=1000, color_system=None)


def require_free(listen: str, field: str) -> None:
    """Report an address in use before models are loaded; the server would do so after. Raises CliError."""
    if listen.startswith("unix:"):
        with socket.socket(socket.AF_UNIX) as probe:
            taken = probe.connect_ex(listen.removeprefix("unix:")) == 0
    else:
        host, _, port = listen.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        with socket.socket(family) as probe:
            taken = int(port) != 0 and probe.connect_ex((host.strip("[]"), int(port))) == 0
    if taken:
        raise CliError(f"{field}: {listen} is in use; give another address, or port 0 for any free one")


async def _serve(settings: Settings, models: dict[str, str], console: Console, *, table: bool) -> None:
    from token_swarm_server.launch.launcher import launch

    importing = asyncio.create_task(session.import_coordinator())

    tables: list[asyncio.Task[None]] = []

    def ready(address: str) -> None:
        if table and settings.coordinator.tls is None and settings.coordinator.tokens is None:
            tables.append(asyncio.create_task(_show(address, console)))
        console.print(f"serving on {address}; stop with Ctrl-C", markup=False, highlight=False)

    with session.start_errors():
        async with launch(settings, models, console=console) as experts:
            run_coordinator = await importing
            await run_coordinator(settings, experts.endpoints, reviver=experts, ready=ready)
            await asyncio.gather(*tables)
            console.print("stopping the experts")


async def _show(address: str, console: Console) -> None:
    from token_swarm.v1 import swarm_pb2
    from token_swarm_server.cli.client import connect
    from token_swarm_server.cli.report import experts_table

    async with connect(address) as stub:
        listed: Any = await stub.ListExperts(swarm_pb2.ListExpertsRequest())
    console.print(experts_table(listed.experts))
