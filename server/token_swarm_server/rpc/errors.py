"""Exceptions of the server, and the one table that maps exceptions to gRPC status."""

from __future__ import annotations

import logging
import traceback
from typing import Any, NoReturn

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from token_swarm.errors import BadParameter, ExpertFault, FailedPrecondition, UnknownName

logger = logging.getLogger(__name__)

# A status travels in the trailing metadata, three times and encoded. Clients take 8 KB of metadata: a longer answer
# would reach them as RESOURCE_EXHAUSTED.
MESSAGE_BYTES = 600
FIELD_BYTES = 100


class Unavailable(RuntimeError):
    """The server cannot answer now. `retry_after`: seconds after which asking again may help."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ExpertUnavailable(Unavailable):
    """An expert's process died, or cannot be reached. `name` is the expert's."""

    def __init__(self, name: str, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(f"expert {name!r} is unavailable: {reason}", retry_after)
        self.name = name
        self.reason = reason


class DeadlineExceeded(RuntimeError):
    """A request outlived what the server allows."""


class QueueFull(RuntimeError):
    """No more requests are admitted. `retry_after`: seconds after which asking again may help."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TransportError(RuntimeError):
    """The other end sent what its protocol does not allow, or a shared slot is stale or torn."""


_CODES: tuple[tuple[type[Exception], int], ...] = (
    (BadParameter, code_pb2.INVALID_ARGUMENT),
    (TransportError, code_pb2.INVALID_ARGUMENT),
    (UnknownName, code_pb2.NOT_FOUND),
    (FailedPrecondition, code_pb2.FAILED_PRECONDITION),
    (DeadlineExceeded, code_pb2.DEADLINE_EXCEEDED),
    (QueueFull, code_pb2.RESOURCE_EXHAUSTED),
    (Unavailable, code_pb2.UNAVAILABLE),
    (ExpertFault, code_pb2.UNAVAILABLE),
)


def to_status(exception: Exception) -> status_pb2.Status:
    """`google.rpc.Status` of an exception, with BadRequest or RetryInfo details where they apply.

    An exception that is not in the table is a bug: its text stays in the log and the caller gets INTERNAL.
    """
    code = next((code for kind, code in _CODES if isinstance(exception, kind)), None)
    if code is None:
        return status_pb2.Status(code=code_pb2.INTERNAL, message="internal error; the server's log has more")
    message = _brief(str(exception), MESSAGE_BYTES)
    status = status_pb2.Status(code=code, message=message)
    if isinstance(exception, BadParameter):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_brief(exception.field, FIELD_BYTES), description=message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(exception, QueueFull | Unavailable):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(exception.retry_after * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _brief(text: str, limit: int) -> str:
    """At most about `limit` bytes of UTF-8 of a text that may quote the caller, and nothing that a terminal obeys."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    data = line.encode("utf-8", "backslashreplace")
    return data.decode() if len(data) <= limit else f"{data[:limit].decode(errors='ignore')}..."


async def abort(context: grpc.aio.ServicerContext[Any, Any], exception: Exception) -> NoReturn:
    """End a call with the status of `exception`. Never returns: grpc raises to leave the handler.

    grpc's own abort exception is passed through, so that a handler may wrap its whole body in one `except`.
    """
    if isinstance(exception, grpc.aio.AbortError):
        raise exception
    status = to_status(exception)
    if status.code == code_pb2.INTERNAL:
        logger.error("unexpected %s", type(exception).__name__, exc_info=exception)
    # grpc.aio has no abort_with_status, but the same three parts can be given one by one.
    parts = rpc_status.to_status(status)
    await context.abort(parts.code, parts.details, parts.trailing_metadata)


def forget_frames(exception: BaseException) -> None:
    """Let go of the local variables of every call that `exception` and those behind it ended.

    They hold each other and gRPC's call, which holds the exception: a text's laws, of some MB, would stay until the
    collector of cycles comes by, which in a process with large vocabularies is seldom. For an exception that no other
    task was given: until Python 3.13 this ends a call that it went through and that still waits for something.
    """
    behind: BaseException | None = exception
    while behind is not None:
        traceback.clear_frames(behind.__traceback__)
        behind = behind.__cause__ or behind.__context__
