"""Calls of every kind to a coordinator that may ask for a certificate or a token, and what they end with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from token_swarm_server.config.settings import ClientTls
from token_swarm_server.rpc.channels import open_blocking_channel, open_channel

from tests.integration.test_coordinator import Running
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

SERVICE = "/token_swarm.v1.SwarmService"
REQUEST = swarm_pb2.GenerateRequest(prompt="cab", sampling=swarm_pb2.Sampling(seed=1), max_bytes=12)
# With grpc's pool, a client without a certificate might travel in the connection of one that has one.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
# How a handshake that fails looks to grpc: the call never came to be, so no server could give it a status.
NO_CONNECTION = grpc.StatusCode.UNAVAILABLE


@asynccontextmanager
async def channel_to(
    running: Running, tls: ClientTls | None, token: str | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(running.address, tls, token=token, options=OWN_CONNECTION) as channel:
        yield channel


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Code and details of a call that must fail; of a stream as well."""
    with pytest.raises(grpc.RpcError) as caught:
        async with asyncio.timeout(10):
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
    error: Any = caught.value
    return error.code(), error.details() or ""


def text_of_one_process() -> str:
    text, _ = LocalEnsemble(toys([NESTED, LONG], max_context=200)).generate(
        "cab",
        Mixture({"e0": 0.5, "e1": 0.5}, Rule.LOG_LINEAR),
        DecodeRequest(sampling=Sampling(1.0), seed=1, max_bytes=12, epsilon=0.1),
    )
    return text


async def reflect(address: str, tls: ClientTls, metadata: Any) -> list[str]:
    """The services that reflection lists.

    By grpc's client for threads: the one for asyncio reports INTERNAL when a server answers while it still writes.
    """

    def ask() -> list[str]:
        with open_blocking_channel(address, tls, options=OWN_CONNECTION) as channel:
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            answers = list(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=10))
            return [service.name for service in answers[0].list_services_response.service]

    return await asyncio.to_thread(ask)


def every_call(address: str, tls: ClientTls, channel: grpc.aio.Channel, metadata: Any = ()) -> dict[str, Any]:
    """One call of every kind but health, by what it is."""
    stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
    raw = channel.unary_unary(f"{SERVICE}/Score")
    return {
        "Generate": stub.Generate(REQUEST, metadata=metadata),
        "Score": stub.Score(swarm_pb2.ScoreRequest(text="abc"), metadata=metadata),
        "ListExperts": stub.ListExperts(swarm_pb2.ListExpertsRequest(), metadata=metadata),
        "ListParticles": stub.ListParticles(swarm_pb2.ListParticlesRequest(), metadata=metadata),
        "GetStatus": stub.GetStatus(swarm_pb2.GetStatusRequest(), metadata=metadata),
        "reflection": reflect(address, tls, metadata),
        "no message": raw(b"\xff\xff", metadata=metadata),
        "no method": channel.unary_unary(f"{SERVICE}/NoSuchMethod")(b"", metadata=metadata),
    }
