"""Calls of the public service, as methods."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from token_swarm_client._v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_client.connection import OPTIONS, Tls, metadata_of
from token_swarm_client.errors import error_of
from token_swarm_client.requests import GenerateOptions, MixtureOptions, generate_request, score_request
from token_swarm_client.streams import AsyncTextStream, TextStream

_T = TypeVar("_T")


class Client:
    """A connection to the server at `address`, `host:port` or `unix:/path`; it is made at the first call.

    token: bearer token of a server that asks for one. tls: how to encrypt; None: not at all. timeout: deadline of every
    call in seconds, None for none. Threads may share a client; `agenerate` belongs to one event loop, and a client that
    has used it is closed by `aclose`.
    Raises ValueError for a token that would travel to another machine unencrypted, OSError for unreadable TLS files.
    """

    def __init__(
        self, address: str, *, token: str | None = None, tls: Tls | None = None, timeout: float | None = None
    ) -> None:
        self._address, self._timeout = address, timeout
        self._metadata = metadata_of(address, token, tls)
        self._credentials = None if tls is None else tls.credentials()
        if self._credentials is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, self._credentials, options=OPTIONS)
        self._stub = swarm_pb2_grpc.SwarmServiceStub(self._channel)
        self._async_channel: grpc.aio.Channel | None = None

    def generate(
        self, prompt: str = "", *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> TextStream:
        """Continue `prompt`. Errors of the call are raised where the stream is read.

        Raises TypeError or ValueError for options that no request can hold.
        """
        request = generate_request(prompt, options)
        return TextStream(self._stub.Generate(request, timeout=self._deadline(timeout), metadata=self._metadata))

    def agenerate(
        self, prompt: str = "", *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """`generate` for asyncio, inside a running event loop."""
        request = generate_request(prompt, options)
        if self._async_channel is None:
            self._async_channel = self._open_async()
        stub: swarm_pb2_grpc.SwarmServiceAsyncStub = swarm_pb2_grpc.SwarmServiceStub(self._async_channel)
        return AsyncTextStream(stub.Generate(request, timeout=self._deadline(timeout), metadata=self._metadata))

    def score(
        self,
        text: str,
        *,
        prompt: str = "",
        chat: bool = False,
        per_byte: bool = False,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[MixtureOptions],
    ) -> swarm_pb2.ScoreResponse:
        """Log-probability of `text` after `prompt`, in nats, under the ensemble and under each expert.

        Raises SwarmError, and as `generate`.
        """
        request = score_request(text, prompt, chat=chat, per_byte=per_byte, request_id=request_id, options=options)
        return self._call(self._stub.Score, request, timeout)

    def experts(self, *, timeout: float | None = None) -> list[swarm_pb2.ExpertInfo]:
        """The experts of the server, in the order of its configuration. Raises SwarmError."""
        listed: swarm_pb2.ListExpertsResponse = self._call(
            self._stub.ListExperts, swarm_pb2.ListExpertsRequest(), timeout
        )
        return list(listed.experts)

    def particles(self, *, timeout: float | None = None) -> list[swarm_pb2.ParticleInfo]:
        """The named mixtures of the server. Raises SwarmError."""
        listed: swarm_pb2.ListParticlesResponse = self._call(
            self._stub.ListParticles, swarm_pb2.ListParticlesRequest(), timeout
        )
        return list(listed.particles)

    def close(self) -> None:
        """Close the connection; what runs on it is cancelled."""
        self._channel.close()

    async def aclose(self) -> None:
        """Close the connections of `agenerate` and of the other calls."""
        self.close()
        if self._async_channel is not None:
            await self._async_channel.close(None)
            self._async_channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def _call(self, method: Callable[..., _T], request: Any, timeout: float | None) -> _T:
        try:
            return method(request, timeout=self._deadline(timeout), metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error

    def _deadline(self, own: float | None) -> float | None:
        return self._timeout if own is None else own

    def _open_async(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._address, options=OPTIONS)
        return grpc.aio.secure_channel(self._address, self._credentials, options=OPTIONS)
