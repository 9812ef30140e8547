"""Who may call: an interceptor that turns callers away before their request is read."""

# ruff: noqa: ARG001 - gRPC gives the handlers their arguments

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from typing import Any, TypeAlias

import grpc

from token_swarm_server.rpc.bearer_tokens import TokenStore

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# A prober (a load balancer, a kubelet) has no secret to show, and what it learns is one word that a caller who is
# turned away learns as well: whether somebody serves here.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
TOKEN_NEEDED = "a valid bearer token is needed: `authorization: Bearer TOKEN` in the metadata of the call"
_ALTERNATIVE_NAMES = "x509_subject_alternative_name"
NAME_NEEDED = "the client's certificate has none of the names that may call"


class Authentication(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Asks each call for a token (`tokens`), and its certificate for one of `names`, where these are given.

    Who has not got them is answered UNAUTHENTICATED, whatever was wrong and whether or not the method exists.
    """

    def __init__(self, tokens: TokenStore | None, names: Collection[str] = ()) -> None:
        self._tokens = tokens
        self._names = frozenset(names)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return the method's handler, or one that refuses."""
        method = handler_call_details.method
        if method in OPEN_METHODS:
            return await continuation(handler_call_details)
        if self._tokens is not None and not self._has_token(self._tokens, handler_call_details.invocation_metadata):
            return _refusal(method, TOKEN_NEEDED)
        if not self._names:
            return await continuation(handler_call_details)
        # The certificate is known only once the call has a context. A method that does not exist has no handler.
        handler = await continuation(handler_call_details)
        return _refusal(method, NAME_NEEDED) if handler is None else _named(handler, self._names, method)

    @staticmethod
    def _has_token(tokens: TokenStore, metadata: Any) -> bool:
        given = [value for key, value in metadata if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            return False
        scheme, _, token = given[0].partition(" ")
        return scheme.lower() == "bearer" and tokens.accepts(token)


def _refusal(method: str, message: str) -> Any:
    """A handler that refuses; of the style that needs no request to begin with."""

    async def refuse(requests: Any, context: Context) -> None:
        await _refuse(method, message, context)

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _refuse(method: str, message: str, context: Context) -> None:
    # The method is the caller's text: repr leaves no way to end the line or to speak to a terminal.
    logger.info("refused %.100r of %s: not authenticated", method, context.peer())
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)


def _named(handler: Any, names: Collection[str], method: str) -> Any:
    """`handler`, for callers whose certificate has one of `names`."""
    kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    inner = getattr(handler, "_".join(kind))

    async def check(context: Context) -> None:
        # Not grpc's peer identities: without alternative names they are the common name, which no authority checks.
        shown = {name.decode("utf-8", "replace") for name in context.auth_context().get(_ALTERNATIVE_NAMES, ())}
        if shown.isdisjoint(names):
            await _refuse(method, NAME_NEEDED, context)

    async def call(request: Any, context: Context) -> Any:
        await check(context)
        return await inner(request, context)

    async def stream(request: Any, context: Context) -> Any:
        await check(context)
        async for response in inner(request, context):
            yield response

    make = getattr(grpc, f"{'_'.join(kind)}_rpc_method_handler")
    return make(
        stream if inspect.isasyncgenfunction(inner) else call,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
