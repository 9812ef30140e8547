"""A server of its own process for one benchmark: `token-swarm serve`, on a private socket."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from token_swarm_server.config.settings import ENV_PREFIX

_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0
_FOR_A_PUBLIC_SERVER = ("TLS", "TOKENS", "METRICS__LISTEN")
"""Keys that are overruled: a folder that only this user can enter guards the socket, and ports may be taken."""


class ServerNotStarted(Exception):
    """A server that ended before it answered: its last line, and the exit code that it ended with."""

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.code = code


@asynccontextmanager
async def own_server(config: Path) -> AsyncIterator[str]:
    """Serve `config` in a child process; gives its address once it answers, and stops it on leaving.

    A process of its own, so that the client's work does not count as the coordinator's.
    Raises ServerNotStarted with the server's own last line when it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="token-swarm-bench-") as folder:
        address = f"unix:{folder}/swarm.sock"
        command = (sys.executable, "-m", "token_swarm_server.cli", "serve", "--config", str(config))
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--listen", address),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **{f"{ENV_PREFIX}COORDINATOR__{key}": "null" for key in _FOR_A_PUBLIC_SERVER}},
        )
        said: deque[str] = deque(maxlen=5)
        listening = asyncio.create_task(_listen(process.stderr, said))
        answering = asyncio.create_task(_serving(address))
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({answering, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                await listening
                last = said[-1].removeprefix("error: ") if said else f"the server ended with {process.returncode}"
                raise ServerNotStarted(last, process.returncode)
            yield address
        finally:
            answering.cancel()
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(asyncio.shield(ended), _STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await ended
            await listening


async def _listen(stream: asyncio.StreamReader | None, said: deque[str]) -> None:
    """Keep the last lines; a pipe that nobody reads would stop the server."""
    assert stream is not None
    async for line in stream:
        if text := line.decode(errors="replace").strip():
            said.append(text)


async def _serving(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            with suppress(grpc.aio.AioRpcError):
                answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=1)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_SECONDS)
