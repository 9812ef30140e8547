"""Starts each expert as a process of its own, waits until all answer, and stops them whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from token_swarm.cores import available_cores
from token_swarm_server.config.addresses import stays_on_this_machine
from token_swarm_server.config.settings import ClientTls, ExpertSettings, Settings
from token_swarm_server.launch.supervisor import ExpertProcess, RestartPolicy
from token_swarm_server.rpc.channels import open_channel
from token_swarm_server.rpc.diagnosis import EXPERT, find
from token_swarm_server.rpc.tls import client_credentials
from token_swarm_server.telemetry.logs import WARNING_PREFIX

CONNECT_SECONDS = 10.0
"""How long an expert that should run already may take to answer."""
_POLL_SECONDS = 0.1
_LOG_LINES = 3
# As in coordinator.expert.connection: an expert that is still loading would be found late.
_CHANNEL = (("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 100))


class LaunchError(RuntimeError):
    """An expert did not come up. The message is one line; `bad_input`: the configuration is to blame."""

    def __init__(self, message: str, *, bad_input: bool) -> None:
        super().__init__(message)
        self.bad_input = bad_input


class Experts:
    """Experts that run, as `launch` gives them. `endpoints`: gRPC address by name, in the configuration's order."""

    def __init__(self, endpoints: Mapping[str, str], running: Sequence[ExpertProcess]) -> None:
        self.endpoints = dict(endpoints)
        self._running = {started.name: started for started in running}

    def restart(self, name: str, reason: str) -> None:
        """End the process of an expert, so that it is started again; one that was not started here is left alone."""
        if name in self._running:
            self._running[name].kill(reason)

    def trouble(self, name: str) -> str | None:
        """Why an expert's process does not run; None while it does, or was not started here."""
        return self._running[name].trouble if name in self._running else None


@asynccontextmanager
async def launch(
    settings: Settings, models: Mapping[str, str], *, console: Console, policy: RestartPolicy | None = None
) -> AsyncIterator[Experts]:
    """Experts of `settings`, running.

    models: what `resolve_models` says. Experts without an address start in parallel, and are started again whenever
    they end; on leaving they get SIGTERM and, after `STOP_SECONDS`, SIGKILL. They also end by themselves when this
    process is killed. Progress goes to `console`.
    Raises LaunchError when an expert does not come up the first time, and BadParameter for TLS files that cannot be
    used.
    """
    for name, expert in settings.experts.items():
        if expert.tls is not None:
            # Otherwise bad files would be found only when other experts have been loaded.
            client_credentials(expert.tls, f"experts.{name}.tls.")
    local = settings.local_experts()
    # Short and private: the path of a UNIX socket has at most 107 bytes, and who opens it can use the model.
    runtime = Path(tempfile.mkdtemp(prefix="token-swarm-"))
    running: list[ExpertProcess] = []

    def report(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for name, expert in settings.experts.items():
        if expert.address is not None and expert.tls is None and not stays_on_this_machine(expert.address):
            report(f"experts.{name}.address: prompts and logits travel to {expert.address} unencrypted; tls would help")
    try:
        endpoints = {
            name: expert.address or f"unix:{runtime}/{index}.sock"
            for index, (name, expert) in enumerate(settings.experts.items())
        }
        cores = _share_cores(local)
        for name, expert in local.items():
            given = expert.model_copy(update={"threads": expert.threads or _default_threads(len(local))})
            log = settings.cache / "logs" / f"{name}.log"
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_bytes(b"")
            except OSError as error:
                raise LaunchError(f"cache: {log} cannot be written: {error.strerror}", bad_input=True) from error
            pinned = cores.get(name) if settings.pin_cores else None
            spawn = partial(_spawn, name, models[name], given, endpoints[name], log, pinned)
            running.append(ExpertProcess(name, log, spawn, policy or RestartPolicy(), report))
            await running[-1].start()
        await _wait_ready(settings, endpoints, {started.name: started for started in running}, console)
        for started in running:
            for warning in _warnings(started.log):
                report(f"expert {started.name}: {warning}")
            started.watch()
        yield Experts(endpoints, running)
    finally:
        # Shielded: a second Ctrl-C must not leave processes behind.
        await asyncio.shield(asyncio.gather(*(started.stop() for started in running)))
        shutil.rmtree(runtime, ignore_errors=True)


def _default_threads(experts: int) -> int:
    return max(1, len(available_cores()) // experts)


def _share_cores(local: Mapping[str, ExpertSettings]) -> dict[str, set[int]]:
    """Cores of each expert, disjoint; empty when there are too few, or the system cannot pin."""
    needed = {name: expert.threads or _default_threads(len(local)) for name, expert in local.items()}
    cores = iter(available_cores())
    if sum(needed.values()) > len(available_cores()) or not hasattr(os, "sched_setaffinity"):
        return {}
    return {name: {next(cores) for _ in range(count)} for name, count in needed.items()}


async def _spawn(
    name: str, model: str, expert: ExpertSettings, address: str, log: Path, cores: Collection[int] | None
) -> Process:
    """Start an expert's process, on `cores` if it is to be pinned. Raises LaunchError when it cannot be run."""
    threads = str(expert.threads)
    command = [
        str(expert.python or sys.executable), "-m", "token_swarm_server.cli", "expert", name,
        "--model", model, "--address", address, "--backend", expert.backend, "--device", expert.device,
        "--dtype", expert.dtype, "--threads", threads, "--max-sequences", str(expert.max_sequences),
        "--max-context", str(expert.max_context), "--stop-when-input-ends",
        *(f"--engine={key}={value}" for key, value in expert.engine.items()),
    ]  # fmt: skip
    # Appending keeps the log in order should two servers share a cache, and what a dead predecessor said.
    with log.open("ab") as out:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                # A Ctrl-C in the terminal is for the coordinator, which lets running texts end first.
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"experts.{name}.python: {command[0]} cannot be run: {error.strerror}", bad_input=True
            ) from error
    if cores:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, cores)
    return process


async def _wait_ready(
    settings: Settings, endpoints: Mapping[str, str], running: Mapping[str, ExpertProcess], console: Console
) -> None:
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        async def one(name: str, address: str) -> None:
            task = progress.add_task(f"expert {name}: loading", total=1)
            await _wait_one(name, address, settings.experts[name].tls, running.get(name))
            progress.update(task, description=f"expert {name}: ready", completed=1)

        waits = [asyncio.create_task(one(name, address)) for name, address in endpoints.items()]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


async def _wait_one(name: str, address: str, tls: ClientTls | None, started: ExpertProcess | None) -> None:
    """Return once the expert's health is SERVING. Raises LaunchError when it exits, or nothing answers."""
    channel = open_channel(address, tls, options=_CHANNEL, tls_prefix=f"experts.{name}.tls.")
    said: list[str] = []
    health = asyncio.create_task(_serving(channel, said))
    try:
        if started is None:
            await asyncio.wait({health}, timeout=CONNECT_SECONDS)
            found = await find(address, wanted=EXPERT, tls=tls is not None)
            if found and health.done():
                raise LaunchError(f"experts.{name}.address: {address}: {found}", bad_input=True)
            if not health.done():
                raise LaunchError(
                    f"experts.{name}.address: no expert answers at {address} within {CONNECT_SECONDS:.0f} s"
                    + "".join(f" ({reason})" for reason in [found or "".join(said[-1:])] if reason),
                    bad_input=False,
                )
            return
        gone = asyncio.create_task(started.process.wait())
        try:
            await asyncio.wait({health, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise _exit_error(started)
        finally:
            gone.cancel()
    finally:
        health.cancel()
        await channel.close(None)


async def _serving(channel: grpc.aio.Channel, said: list[str]) -> None:
    """Return once health is SERVING; why it is not goes to `said`."""
    stub = health_pb2_grpc.HealthStub(channel)
    while True:
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.aio.AioRpcError as error:
            said[:] = [error.details() or error.code().name]
        await asyncio.sleep(_POLL_SECONDS)


def _warnings(log: Path) -> list[str]:
    """What an expert's process had to say while it loaded the model."""
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix(WARNING_PREFIX) for line in lines if line.startswith(WARNING_PREFIX)]


def _exit_error(started: ExpertProcess) -> LaunchError:
    code = started.process.returncode
    lines = [line.strip() for line in started.log.read_text(errors="replace").splitlines() if line.strip()]
    if lines and lines[-1].startswith("error: "):
        return LaunchError(lines[-1].removeprefix("error: "), bad_input=code == 2)
    how = f"was ended by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
    said = " | ".join(lines[-_LOG_LINES:]) or "nothing"
    return LaunchError(f"expert {started.name!r} {how} while starting; last in {started.log}: {said}", bad_input=False)
