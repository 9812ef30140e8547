"""Bytes that are no message: every server answers them with INVALID_ARGUMENT, where grpc would answer INTERNAL."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from token_swarm_server.rpc.errors import TransportError

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Malformed:
    reason: str


class MalformedRequests(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Answers bytes that are no request. Methods that take a stream see to it themselves, with `read_message`."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wrap the handler's deserializer and its function."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        parse = handler.request_deserializer

        def deserialize(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError as error:
                return _Malformed(str(error))

        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(
                _checked(handler.unary_unary),
                request_deserializer=deserialize,
                response_serializer=handler.response_serializer,
            )
        inner = handler.unary_stream
        return grpc.unary_stream_rpc_method_handler(
            _checked_generator(inner) if inspect.isasyncgenfunction(inner) else _checked(inner),
            request_deserializer=deserialize,
            response_serializer=handler.response_serializer,
        )


def _checked(inner: Any) -> Any:
    async def call(request: Any, context: Context) -> Any:
        await _refuse_malformed(request, context)
        return await inner(request, context)

    return call


def _checked_generator(inner: Any) -> Any:
    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        await _refuse_malformed(request, context)
        async for response in inner(request, context):
            yield response

    return stream


async def _refuse_malformed(request: Any, context: Context) -> None:
    if isinstance(request, _Malformed):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"request: not a valid message ({request.reason}); its text fields must be valid UTF-8",
        )


async def read_message(context: Context) -> Any:
    """The next message of a stream of requests, or END_OF_STREAM. Raises TransportError for bytes that are none."""
    try:
        return await context.read()
    except DecodeError as error:
        raise TransportError(f"request: not a valid message ({error})") from error
