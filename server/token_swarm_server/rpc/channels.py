"""Channels to the project's servers: plain or TLS, with a bearer token where the server asks for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc

from token_swarm_server.config.settings import PUBLIC_MESSAGE_BYTES, ClientTls
from token_swarm_server.rpc.tls import client_credentials

ChannelOptions: TypeAlias = Sequence[tuple[str, Any]]

# http_proxy in the environment would divert loopback connections.
_ALWAYS = (("grpc.enable_http_proxy", 0),)
PUBLIC_OPTIONS = (
    ("grpc.max_send_message_length", PUBLIC_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", PUBLIC_MESSAGE_BYTES),
)
"""For channels to the public service."""


def open_channel(
    address: str,
    tls: ClientTls | None = None,
    *,
    token: str | None = None,
    options: ChannelOptions = (),
    tls_prefix: str = "tls.",
) -> grpc.aio.Channel:
    """A channel to `address`; without `tls` it is not encrypted.

    `token`: sent with every call that has one request. `tls_prefix`: of its keys in errors.
    Raises BadParameter for TLS files that cannot be used.
    """
    interceptors: list[Any] = [] if token is None else [_UnaryBearer(token), _StreamBearer(token)]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=(*_ALWAYS, *options), interceptors=interceptors)
    return grpc.aio.secure_channel(
        address, client_credentials(tls, tls_prefix), options=(*_ALWAYS, *options), interceptors=interceptors
    )


def open_blocking_channel(
    address: str,
    tls: ClientTls | None = None,
    *,
    token: str | None = None,
    options: ChannelOptions = (),
    tls_prefix: str = "tls.",
) -> grpc.Channel:
    """`open_channel` for threads."""
    if tls is None:
        channel = grpc.insecure_channel(address, options=(*_ALWAYS, *options))
    else:
        channel = grpc.secure_channel(address, client_credentials(tls, tls_prefix), options=(*_ALWAYS, *options))
    return channel if token is None else grpc.intercept_channel(channel, _BlockingBearer(token))


# Call credentials would do the same, but gRPC refuses them on a channel without TLS, even to this machine.
class _Bearer:
    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _with_token(self, details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), self._entry))


class _UnaryBearer(_Bearer, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # not at run time
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._with_token(client_call_details), request)


class _StreamBearer(_Bearer, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]  # not at run time
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self._with_token(client_call_details), request)


class _BlockingBearer(
    _Bearer,
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]  # not at run time
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
):
    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)
