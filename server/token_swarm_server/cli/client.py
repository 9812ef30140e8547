"""The CLI's end of SwarmService: a channel, and errors in the user's words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.cli.errors import BAD_INPUT, FAILURE, CliError
from token_swarm_server.cli.options import PLAIN, Credentials
from token_swarm_server.config.addresses import stays_on_this_machine
from token_swarm_server.rpc.channels import PUBLIC_OPTIONS, open_channel
from token_swarm_server.rpc.diagnosis import COORDINATOR, find

_BAD_INPUT_CODES = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
)
# What grpc says of a connection that did not come about, and what it means.
_HANDSHAKES = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not from an authority of --tls-ca"),
    ("Hostname Verification", "its certificate is for another name than that of the address"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS; leave the --tls flags out"),
)
_CLOSED = "Socket closed"
_START = "start one with `token-swarm serve`, or give --config to this command"


@asynccontextmanager
async def connect(
    address: str, credentials: Credentials = PLAIN
) -> AsyncIterator[swarm_pb2_grpc.SwarmServiceAsyncStub]:
    """A stub for the server at `address`; inside, failed calls raise CliError.

    Raises CliError for a token that others could read on its way, and BadParameter for bad TLS files.
    """
    async with open_public_channel(address, credentials) as channel:
        stub: swarm_pb2_grpc.SwarmServiceAsyncStub = swarm_pb2_grpc.SwarmServiceStub(channel)
        try:
            yield stub
        except grpc.aio.AioRpcError as error:
            raise await diagnosed(error, address, credentials) from error


async def diagnosed(error: grpc.aio.AioRpcError, address: str, credentials: Credentials = PLAIN) -> CliError:
    """`explain`, and for a server that cannot be the right one what was found at its address."""
    unreached = error.code() is grpc.StatusCode.UNAVAILABLE and rpc_status.from_call(error) is None  # type: ignore[arg-type]
    if not unreached and error.code() is not grpc.StatusCode.UNIMPLEMENTED:
        return explain(error, address, credentials)
    found = await find(address, wanted=COORDINATOR, tls=credentials.tls is not None)
    if not found:
        return explain(error, address, credentials)
    here = f"{address}: {found}"
    if unreached and found.startswith(("nothing ", "there is no ")):
        return CliError(f"no server answers at {here}; {_START}", FAILURE)
    return CliError(here, BAD_INPUT)


def open_public_channel(address: str, credentials: Credentials) -> grpc.aio.Channel:
    """A channel to the public service at `address`. Raises as `connect` does."""
    require_private_token(address, credentials)
    return open_channel(address, credentials.tls, token=credentials.token, options=PUBLIC_OPTIONS, tls_prefix="--tls-")


def require_private_token(address: str, credentials: Credentials) -> None:
    """Raise CliError for a token that would travel to another machine in the clear."""
    if credentials.token is not None and credentials.tls is None and not stays_on_this_machine(address):
        raise CliError(
            f"--token-file: the token would travel to {address} unencrypted; give --tls-ca (or --tls)", BAD_INPUT
        )


async def stream_text(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub,
    request: swarm_pb2.GenerateRequest,
    write: Callable[[str], object],
) -> swarm_pb2.Finish:
    """Generate; `write` gets each piece of text as it arrives. Returns the final message."""
    async for response in stub.Generate(request):
        if response.WhichOneof("event") == "finish":
            return response.finish
        write(response.chunk.text)
    raise CliError("the server ended the stream without a final message", FAILURE)


def explain(error: grpc.aio.AioRpcError, address: str, credentials: Credentials = PLAIN) -> CliError:
    """What a failed call means to the user."""
    code, message = error.code(), error.details() or "no details"
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # it only needs the three getters it has
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        if (reason := _handshake(message, tls=credentials.tls is not None)) is not None:
            return CliError(f"the server at {address} cannot be talked to: {reason}", BAD_INPUT)
        return CliError(f"no server answers at {address}; {_START}", FAILURE)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        message += "; --token-file names a file with one" if credentials.token is None else "; the one given is not"
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            violations = [f"{each.field}: {each.description}" for each in request.field_violations]
            message = "; ".join([message, *(v for v in violations if v.partition(": ")[2] not in message)])
    return CliError(message, BAD_INPUT if code in _BAD_INPUT_CODES else FAILURE)


def _handshake(message: str, *, tls: bool) -> str | None:
    """Why a connection did not come about although somebody listens; None if nobody does."""
    if "failed to connect" not in message:
        return None
    if _CLOSED in message:
        wanted = "another client certificate (--tls-certificate, --tls-key)" if tls else "TLS (--tls-ca, or --tls)"
        return f"it closed the connection; it may want {wanted}"
    return next((meaning for said, meaning in _HANDSHAKES if said in message), None)


def plain(message: Message) -> dict[str, Any]:
    """A message for JSON: 64-bit integers stay numbers, enums lose their prefix, absent fields are null.

    protobuf's own JSON form makes strings of 64-bit integers.
    """
    return {field.name: _plain_field(message, field) for field in message.DESCRIPTOR.fields}


def _plain_field(message: Message, field: Any) -> Any:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    return [_plain_value(one, field) for one in value] if field.is_repeated else _plain_value(value, field)


def _plain_value(value: Any, field: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        return enum_name(field.enum_type, value)
    return value


def enum_name(enum: Any, value: int) -> str:
    """Name of an enum's value without the prefix that all its values share: `max_bytes`, `byte`."""
    names = [each.name for each in enum.values]
    prefix = names[0].removesuffix("UNSPECIFIED")
    found = enum.values_by_number.get(value)
    return found.name.removeprefix(prefix).lower() if found else str(value)
