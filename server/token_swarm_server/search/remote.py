"""A running coordinator as what writes the texts of a search."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.mixing.defaults import DEFAULT_WINDOW
from token_swarm.particle import Mixture
from token_swarm.search.score_cache.cache import ExpertKey
from token_swarm.search.utility import UtilityUnavailable
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm_server.config.settings import ClientTls
from token_swarm_server.coordinator.messages import RULES, UNITS, mixture_to_proto
from token_swarm_server.rpc.channels import PUBLIC_OPTIONS, open_blocking_channel
from token_swarm_server.rpc.diagnosis import COORDINATOR, find

_ATTEMPTS = 6
"""At a server that is busy or restarts an expert, half a second apart at first and doubling: 16 s in all."""
_TIMEOUT = 600.0
"""Seconds for one text: a server that hangs must not hold the search for ever."""
_LATER = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_MIXTURES_FAULT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)


class RemoteEnsemble:
    """Generates at the server that listens at `address`. For several threads at once; a context manager."""

    def __init__(
        self, address: str, *, tls: ClientTls | None = None, token: str | None = None, wait: float = 0.5
    ) -> None:
        """wait: seconds before the second attempt at a busy server. Raises BadParameter for bad TLS files."""
        self._address, self._wait, self._encrypted = address, wait, tls is not None
        self._channel = open_blocking_channel(address, tls, token=token, options=PUBLIC_OPTIONS, tls_prefix="--tls-")
        self._stub: swarm_pb2_grpc.SwarmServiceStub = swarm_pb2_grpc.SwarmServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def keys(self) -> dict[str, ExpertKey]:
        """What tells its experts apart, by name, as far as a server says. Raises UtilityUnavailable."""
        try:
            experts = self._stub.ListExperts(swarm_pb2.ListExpertsRequest()).experts
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise UtilityUnavailable(f"the server at {self._address} refuses: {error.details()}") from error
            found = asyncio.run(find(self._address, wanted=COORDINATOR, tls=self._encrypted))
            said = f"{self._address}: {found}" if found else f"no server answers at {self._address}: {error.details()}"
            raise UtilityUnavailable(said) from error
        return {
            each.name: ExpertKey(each.name, each.architecture, each.fingerprint, str(each.group), each.dtype)
            for each in experts
        }

    def generate(self, prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> str:
        """See `utilities.Generate`. Raises UtilityUnavailable, and BadParameter for what the server refuses."""
        message = request_to_proto(prompt, mixture, request, chat)
        for attempt in range(_ATTEMPTS):
            try:
                responses = self._stub.Generate(message, timeout=_TIMEOUT)
                return "".join(each.chunk.text for each in responses if each.WhichOneof("event") == "chunk")
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code in _MIXTURES_FAULT:
                    raise BadParameter("mixture", dict(mixture.weights), f"what the server takes: {details}") from error
                if code not in _LATER or attempt == _ATTEMPTS - 1:
                    raise UtilityUnavailable(f"the server at {self._address}: {code.name}: {details}") from error
                time.sleep(self._wait * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def request_to_proto(prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> swarm_pb2.GenerateRequest:
    """The request that makes a server write what `LocalEnsemble.generate` would.

    Raises BadParameter for a window, which a request cannot carry.
    """
    if request.window != DEFAULT_WINDOW:
        raise BadParameter("window", request.window, f"{DEFAULT_WINDOW}: a server keeps to its own")
    if mixture.rule not in RULES:
        known = [each.value for each in RULES]
        raise BadParameter("rule", mixture.rule.value, f"one of {known}: requests can name no other")
    sampling = request.sampling
    return swarm_pb2.GenerateRequest(
        prompt=prompt,
        chat=chat,
        mixture=mixture_to_proto(mixture),
        unit=UNITS[request.unit],
        sampling=swarm_pb2.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=request.seed,
        ),
        max_bytes=request.max_bytes,
        max_tokens=request.max_tokens,
        stop=[each.decode() for each in request.stop],
        epsilon=request.epsilon,
    )
