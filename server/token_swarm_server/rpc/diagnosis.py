"""What is found at an address where the wanted service does not answer: the sentence that an error needs.

Asked only after a call has failed, so it may take a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import stat
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from token_swarm_server.config.addresses import LONG_FORMS, split_target
from token_swarm_server.config.settings import DEFAULT_LISTEN

COORDINATOR = "token_swarm.v1.SwarmService"
EXPERT = "token_swarm.v1.ExpertService"
_WHAT = {COORDINATOR: "a coordinator", EXPERT: "an expert"}
_EXAMPLE = {COORDINATOR: DEFAULT_LISTEN, EXPERT: "127.0.0.1:50071"}
_HOW_TO_ENCRYPT = {COORDINATOR: "give --tls-ca (or --tls)", EXPERT: "give the expert's key tls"}
_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 2.0
# A metrics port asks the experts before it answers.
_HTTP_SECONDS = 4.0
_LOOK = b"GET /metrics HTTP/1.0\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n"
# gRPC's servers open with an HTTP/2 settings frame: three bytes of length, then type 4.
_SETTINGS = 4


async def find(address: str, *, wanted: str | None, tls: bool) -> str:
    """What there is at `address`, a gRPC address to connect to, in words that follow the address and a colon.

    `wanted`: COORDINATOR, EXPERT, or None: any of the two. `tls`: whether the caller encrypts. Empty: nothing that
    explains a failure.
    """
    if address.startswith(LONG_FORMS):
        return ""
    try:
        path, host, port = split_target(address)
    except ValueError as error:
        return str(error)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await (
                asyncio.open_unix_connection(path) if path is not None else asyncio.open_connection(host, port)
            )
        writer.close()
    except TimeoutError:
        return f"nothing answers there within {_CONNECT_SECONDS:g} s (a firewall, or another machine's address?)"
    except OSError as error:
        return _no_connection(error, path, host)
    if await _speaks_tls(path, host, port):
        return "" if tls else f"the server wants TLS; {_HOW_TO_ENCRYPT[wanted or COORDINATOR]}"
    if tls:
        return "the server does not speak TLS; leave the TLS settings out"
    said, example = await _first_words(path, host, port), _EXAMPLE[wanted or COORDINATOR]
    if b"token_swarm_" in said:
        return f"this is the metrics port of Token Swarm; give its gRPC address, such as {example}"
    if said.startswith(b"HTTP/"):
        return f"this is an HTTP server (the metrics port?); give the gRPC address, such as {example}"
    if len(said) < 4 or said[3] != _SETTINGS:
        return "something listens there, but it does not speak gRPC"
    return "" if wanted is None else await _which_service(address, wanted)


def _no_connection(error: OSError, path: str | None, host: str) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name {host!r} is not known ({error.strerror})"
    if path is None:
        if error.errno == errno.ECONNREFUSED or "refused" in str(error).lower() or "Connect call failed" in str(error):
            return "nothing listens there"
        return f"it cannot be reached ({error.strerror or error})"
    match error.errno:
        case errno.ENOENT:
            return f"there is no socket {path}"
        case errno.EACCES:
            return f"this user may not connect to the socket {path}"
        case errno.ECONNREFUSED:
            is_socket = stat.S_ISSOCK(Path(path).stat().st_mode)
            return f"nothing listens at {path} any more" if is_socket else f"{path} is not a socket"
    return f"it cannot be reached ({error.strerror or error})"


async def _speaks_tls(path: str | None, host: str, port: int) -> bool:
    """Whether the server goes on with a TLS handshake, whatever certificates it shows or asks for."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            if path is not None:
                _, writer = await asyncio.open_unix_connection(path, ssl=context, server_hostname="localhost")
            else:
                _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        # An alert of the other end, such as for a certificate that it misses, is TLS as well.
        return "ALERT" in (error.reason or "")
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    return True


async def _first_words(path: str | None, host: str, port: int) -> bytes:
    """What the server answers to a request for metrics over HTTP/1."""
    said = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_HTTP_SECONDS):
            reader, writer = await (
                asyncio.open_unix_connection(path) if path is not None else asyncio.open_connection(host, port)
            )
            try:
                writer.write(_LOOK)
                while (piece := await reader.read(4096)) and b"token_swarm_" not in said and len(said) < 2**20:
                    said += piece
                    if not said.startswith(b"HTTP/"):
                        break
            finally:
                writer.transport.abort()
    return said


async def _which_service(address: str, wanted: str) -> str:
    """Which of our services a gRPC server without TLS has: health checks say so, and need no token."""
    async with grpc.aio.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        there = [service for service in _WHAT if await _has(stub, service)]
    if wanted in there:
        return ""
    if there:
        return f"this is {_WHAT[there[0]]} of Token Swarm, not {_WHAT[wanted]}"
    return f"this is a gRPC server, but not {_WHAT[wanted]} of Token Swarm"


async def _has(stub: health_pb2_grpc.HealthStub, service: str) -> bool:
    try:
        await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_ANSWER_SECONDS)
    except grpc.aio.AioRpcError:
        return False
    return True
