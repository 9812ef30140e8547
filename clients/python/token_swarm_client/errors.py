"""What failed calls raise."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2

_STATUS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that is wrong, and how."""

    field: str
    description: str


class SwarmError(Exception):
    """A call that failed.

    code: name of the gRPC status, such as `UNAVAILABLE`. message: what the server or gRPC says. violations: the fields
    that are wrong. retry_delay: seconds after which asking again may help, None where the server names none.
    """

    def __init__(
        self,
        code: str,
        message: str,
        violations: tuple[FieldViolation, ...] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_delay = retry_delay


def error_of(failed: grpc.RpcError) -> SwarmError:
    """The SwarmError that a failed call of `grpc` or `grpc.aio` stands for."""
    call: grpc.Call = failed  # type: ignore[assignment]  # every error of a call is one
    violations: list[FieldViolation] = []
    retry_delay = None
    for detail in _details(call):
        request, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(request):
            violations += [FieldViolation(each.field, each.description) for each in request.field_violations]
        elif detail.Unpack(retry):
            retry_delay = retry.retry_delay.ToTimedelta().total_seconds()
    return SwarmError(call.code().name, call.details() or "no details", tuple(violations), retry_delay)


def _details(call: grpc.Call) -> list[error_details_pb2.Any]:
    for key, value in call.trailing_metadata() or ():
        if key == _STATUS_KEY:
            return list(status_pb2.Status.FromString(value).details)
    return []
