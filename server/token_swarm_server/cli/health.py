"""`token-swarm health`."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import FAILURE, CliError
from token_swarm_server.config.settings import DEFAULT_LISTEN, ClientTls
from token_swarm_server.rpc.channels import open_channel
from token_swarm_server.rpc.diagnosis import find

_SERVING = "SERVING"
_NO_ANSWER = "NO_ANSWER"
_POLL_SECONDS = 0.5
# A server that is still starting would otherwise be found late.
_CHANNEL = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))


@dataclass(frozen=True)
class _Health:
    """What a server said. `status`: as grpc.health.v1 names it, or NO_ANSWER; `reason`: why there was none."""

    address: str
    service: str
    status: str
    reason: str = ""

    def line(self) -> str:
        what = self.service or "server"
        return f"{what} at {self.address}: {self.status}{f' ({self.reason})' if self.reason else ''}"


def health(
    address: options.Address = None,
    service: Annotated[
        str, typer.Option(help="Full name of one service, such as token_swarm.v1.SwarmService; default: the server.")
    ] = "",
    alive: Annotated[
        bool, typer.Option("--alive", help="Any answer is enough: a server that drains lives, but serves nothing new.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.", min=0.01)] = 5.0,
    wait: Annotated[float, typer.Option(help="Ask again for this many seconds before giving up.", min=0.0)] = 0.0,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    as_json: options.Json = False,
) -> None:
    """Ask a coordinator or an expert whether it serves.

    The exit code is 0 if it does and 1 if not, as probes want it. No token is needed.

    \b
    Examples:
      token-swarm health
      token-swarm health --address unix:/run/token-swarm/smollm2.sock --wait 600
      token-swarm health --address 127.0.0.1:50071 --alive --json
    """
    security = options.credentials(None, tls, tls_ca, tls_certificate, tls_key).tls
    asking = _asked(address or DEFAULT_LISTEN, service, security, alive=alive, seconds=timeout, wait=wait)
    found = session.run(asking)
    good = _good(found, alive=alive)
    if as_json:
        print(json.dumps({**asdict(found), "healthy": good}))
    elif good:
        print(found.line())
    if good:
        return
    if as_json:
        raise typer.Exit(FAILURE)
    raise CliError(found.line(), FAILURE)


def _good(found: _Health, *, alive: bool) -> bool:
    return found.status != _NO_ANSWER if alive else found.status == _SERVING


async def _asked(
    address: str, service: str, tls: ClientTls | None, *, alive: bool, seconds: float, wait: float
) -> _Health:
    """What `_wait` gives; the reason of no answer is what was found at the address, where that explains it."""
    found = await _wait(address, service, tls, alive=alive, seconds=seconds, wait=wait)
    if found.status != _NO_ANSWER:
        return found
    reason = await find(address, wanted=None, tls=tls is not None)
    return replace(found, reason=reason or found.reason)


async def _wait(
    address: str, service: str, tls: ClientTls | None, *, alive: bool, seconds: float, wait: float
) -> _Health:
    """The last answer: the first good one, or what was said when `wait` seconds were over."""
    end = time.monotonic() + wait
    async with open_channel(address, tls, options=_CHANNEL, tls_prefix="--tls-") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            found = await _ask(stub, address, service, seconds)
            if _good(found, alive=alive) or time.monotonic() >= end:
                return found
            await asyncio.sleep(_POLL_SECONDS)


async def _ask(stub: health_pb2_grpc.HealthStub, address: str, service: str, seconds: float) -> _Health:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=seconds)
    except grpc.aio.AioRpcError as error:
        # An answer all the same: only the service is not one of this server's.
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return _Health(address, service, "SERVICE_UNKNOWN")
        reason = " ".join((error.details() or error.code().name).split())
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            reason = "a gRPC server without health checks"
        return _Health(address, service, _NO_ANSWER, reason)
    return _Health(address, service, health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
