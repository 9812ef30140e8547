"""Text for the search from a running coordinator, over its public service."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.mixing.defaults import DEFAULT_WINDOW
from token_swarm.particle import Mixture
from token_swarm.search.utility import UtilityUnavailable
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.config import PUBLIC_MESSAGE_BYTES
from token_swarm_server.public_wire import UNITS, mixture_to_proto

_OPTIONS = (
    ("grpc.max_receive_message_length", PUBLIC_MESSAGE_BYTES),
    # Otherwise http_proxy in the environment diverts loopback connections.
    ("grpc.enable_http_proxy", 0),
)
# The server is starting, restarting an expert, or full: worth another attempt.
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_LASTING = (*_RETRIED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED)


class RemoteGenerate:
    """`token_swarm.search.utilities.Generate` over gRPC; may be called from several threads. A context manager."""

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 600.0,
        retries: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """timeout: seconds for one text. retries: further attempts when the server is down or full."""
        self._address, self._timeout, self._retries, self._sleep = address, timeout, retries, sleep
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = swarm_pb2_grpc.SwarmServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __call__(self, prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> str:
        """The text. Raises UtilityUnavailable when the server stays away, ValueError when it refuses the request."""
        message = _message(prompt, mixture, request, chat)
        for attempt in range(self._retries + 1):
            try:
                events = self._stub.Generate(message, timeout=self._timeout)
                return "".join(event.chunk.text for event in events if event.WhichOneof("event") == "chunk")
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code in _RETRIED and attempt < self._retries:
                    self._sleep(2.0**attempt)
                elif code in _LASTING:
                    raise UtilityUnavailable(f"the server at {self._address} does not generate: {details}") from error
                else:
                    raise ValueError(f"the server refuses: {details}") from error
        raise AssertionError("the last attempt returns or raises")


def _message(prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> swarm_pb2.GenerateRequest:
    if request.window != DEFAULT_WINDOW:
        raise BadParameter("window", request.window, f"{DEFAULT_WINDOW}: a server keeps to its own")
    shaping = request.shaping
    return swarm_pb2.GenerateRequest(
        prompt=prompt,
        chat=chat,
        mixture=mixture_to_proto(mixture),
        unit=UNITS[request.unit],
        sampling=swarm_pb2.Sampling(
            temperature=shaping.temperature,
            top_k=shaping.top_k or None,
            top_p=shaping.top_p,
            min_p=shaping.min_p,
            seed=request.seed,
        ),
        max_bytes=request.max_bytes,
        max_tokens=request.max_tokens,
        stop=[stop.decode() for stop in request.stop],
        epsilon=request.epsilon,
    )
