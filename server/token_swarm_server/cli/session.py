"""Where a command's server comes from: one that runs, or one that is started for this call alone."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from token_swarm_server.cli import options
from token_swarm_server.cli.errors import BAD_INPUT, FAILURE, INTERRUPTED, CliError
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import DEFAULT_LISTEN, MetricsSettings, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from token_swarm.v1 import swarm_pb2_grpc

_T = TypeVar("_T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """asyncio.run, in which SIGINT and SIGTERM cancel `main`, so that its clean-up runs."""

    async def cancellable() -> _T:
        cancel_on_signals()
        return await main

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise typer.Exit(INTERRUPTED) from None


def cancel_on_signals() -> None:
    """From now on SIGINT and SIGTERM cancel the calling task."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("cancel_on_signals is for the inside of a task")
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def stderr_console() -> Console:
    """A console for everything that is not the command's result."""
    from rich.console import Console

    return Console(file=sys.stderr)


def with_server(
    address: str | None,
    config: Path | None,
    call: Callable[[swarm_pb2_grpc.SwarmServiceAsyncStub], Awaitable[_T]],
    credentials: options.Credentials = options.PLAIN,
) -> _T:
    """Run `call` against the server at `address`, or one that is started from `config` for this call.

    `credentials`: for the server at `address`.
    """
    if config is not None and address is not None:
        raise CliError("--address: leave it out, --config starts a server of its own")
    if config is not None:
        return with_own_server(load_settings(config), call)
    return run(_on_server(address or DEFAULT_LISTEN, call, credentials))


def with_own_server(settings: Settings, call: Callable[[swarm_pb2_grpc.SwarmServiceAsyncStub], Awaitable[_T]]) -> _T:
    """Start the experts and a coordinator on a private socket, run `call`, stop everything."""
    console = stderr_console()
    models = ready_models(settings, console)

    async def main() -> _T:
        async with _own_server(settings, models, console) as address:
            return await _on_server(address, call, options.PLAIN)

    return run(main())


def ready_models(settings: Settings, console: Console) -> dict[str, str]:
    """What each local expert loads, demo experts fetched. Outside of any event loop, so that Ctrl-C works."""
    from token_swarm_server.assets.demo_experts import DemoExpertsError
    from token_swarm_server.launch.models import resolve_models

    try:
        return resolve_models(settings.local_experts(), settings.cache, console=console)
    except DemoExpertsError as error:
        raise CliError(str(error), FAILURE) from error


@contextlib.contextmanager
def start_errors() -> Any:
    """What can go wrong while experts and coordinator start, as CliError."""
    from token_swarm_server.launch.launcher import LaunchError
    from token_swarm_server.rpc.errors import TransportError, Unavailable

    try:
        yield
    except LaunchError as error:
        raise CliError(str(error), BAD_INPUT if error.bad_input else FAILURE) from error
    except (Unavailable, TransportError) as error:
        raise CliError(str(error), FAILURE) from error


async def import_coordinator() -> Callable[..., Coroutine[Any, Any, None]]:
    """`run_coordinator`, imported in a thread: torch takes seconds, which the experts need to load anyway."""
    module = await asyncio.to_thread(importlib.import_module, "token_swarm_server.coordinator.server")
    run_coordinator: Callable[..., Coroutine[Any, Any, None]] = module.run_coordinator
    return run_coordinator


async def _on_server(
    address: str,
    call: Callable[[swarm_pb2_grpc.SwarmServiceAsyncStub], Awaitable[_T]],
    credentials: options.Credentials,
) -> _T:
    from token_swarm_server.cli.client import connect

    async with connect(address, credentials) as stub:
        return await call(stub)


@asynccontextmanager
async def _own_server(settings: Settings, models: dict[str, str], console: Console) -> AsyncIterator[str]:
    from token_swarm_server.launch.launcher import launch

    importing = asyncio.create_task(import_coordinator())
    with tempfile.TemporaryDirectory(prefix="token-swarm-") as folder, start_errors():
        # A folder that only this user can enter guards it better than a token.
        private = settings.coordinator.model_copy(
            update={
                "listen": f"unix:{folder}/swarm.sock",
                "tls": None,
                "tokens": None,
                # The port is for a server that stays.
                "metrics": MetricsSettings(),
            }
        )
        async with launch(settings, models, console=console) as experts:
            run_coordinator = await importing
            ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            coordinator = asyncio.create_task(
                run_coordinator(
                    settings.model_copy(update={"coordinator": private}),
                    experts.endpoints,
                    reviver=experts,
                    ready=ready.set_result,
                )
            )
            try:
                waited: set[asyncio.Future[Any]] = {coordinator, ready}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if coordinator.done():
                    coordinator.result()
                # The coordinator would let running texts end; here Ctrl-C means the text itself.
                cancel_on_signals()
                yield await ready
            finally:
                coordinator.cancel()
                await asyncio.gather(coordinator, return_exceptions=True)
