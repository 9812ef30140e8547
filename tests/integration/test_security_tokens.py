"""Calls with and without a token, over real gRPC: who is let in and who is not."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from token_swarm_server.config.settings import ClientTls
from token_swarm_server.rpc import auth
from token_swarm_server.rpc.bearer_tokens import PREFIX, create_token, digest, revoke_token

from tests.integration.guarded_calls import REQUEST, channel_to, every_call, status_of, text_of_one_process
from tests.integration.test_coordinator import collect, coordinator
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc


async def test_without_the_right_token_every_call_is_unauthenticated_in_one_and_the_same_way(
    tmp_path, pki, server, tokens
):
    token = create_token(tokens, "alice")
    wrong = {
        "none": (),
        "empty": (("authorization", ""),),
        "no token": (("authorization", "Bearer"),),
        "an empty one": (("authorization", "Bearer "),),
        "another": (("authorization", f"Bearer {PREFIX}{'A' * 43}"),),
        "the beginning of it": (("authorization", f"Bearer {token[:-1]}"),),
        "what the file has of it": (("authorization", f"Bearer {digest(token)}"),),
        "another scheme": (("authorization", f"Basic {token}"),),
        "no scheme": (("authorization", token),),
        "two spaces": (("authorization", f"Bearer  {token}"),),
        "another key": (("x-authorization", f"Bearer {token}"),),
        "two, one of them right": (("authorization", f"Bearer {token}"), ("authorization", "Bearer x")),
    }
    async with coordinator(tmp_path, tls=server, tokens=str(tokens)) as running:
        answers = {}
        tls = ClientTls(ca=pki.ca)
        async with channel_to(running, tls) as channel:
            for what, metadata in wrong.items():
                for name, call in every_call(running.address, tls, channel, metadata).items():
                    answers[what, name] = await status_of(call)
        assert set(answers.values()) == {(grpc.StatusCode.UNAUTHENTICATED, auth.TOKEN_NEEDED)}, answers
        # Nothing of them came further than the interceptor.
        assert running.engine.observer.counts.requests.received == 0
        assert all(own.steps == 0 for own in running.engine.observer.counts.experts.values())


async def test_with_the_right_token_the_text_is_the_same_as_ever(tmp_path, pki, server, tokens):
    token = create_token(tokens, "alice")
    async with coordinator(tmp_path, tls=server, tokens=str(tokens)) as running:
        async with channel_to(running, ClientTls(ca=pki.ca), token) as channel:
            stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
            text, _ = await collect(stub.Generate(REQUEST))
            assert text == text_of_one_process()
            assert len((await stub.ListExperts(swarm_pb2.ListExpertsRequest())).experts) == 2
        tls = ClientTls(ca=pki.ca)
        async with channel_to(running, tls) as channel:
            # The scheme is not case-sensitive, says RFC 7235.
            calls = every_call(running.address, tls, channel, (("authorization", f"bEARER {token}"),))
            codes = {name: (await status_of(calls.pop(name)))[0] for name in ("no message", "no method")}
            assert codes == {
                "no message": grpc.StatusCode.INVALID_ARGUMENT,
                "no method": grpc.StatusCode.UNIMPLEMENTED,
            }
            assert len(await calls.pop("reflection")) == 3
            await collect(calls.pop("Generate"))
            await asyncio.gather(*calls.values())


async def test_health_needs_no_token(tmp_path, pki, server, tokens):
    create_token(tokens, "alice")
    async with (
        coordinator(tmp_path, tls=server, tokens=str(tokens)) as running,
        channel_to(running, ClientTls(ca=pki.ca)) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_a_token_is_refused_from_the_call_after_it_was_revoked(tmp_path, tokens, caplog):
    token = create_token(tokens, "alice")
    async with coordinator(tmp_path, tokens=str(tokens)) as running, channel_to(running, None, token) as channel:
        stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
        await stub.ListExperts(swarm_pb2.ListExpertsRequest())
        other = create_token(tokens, "bob")
        revoke_token(tokens, "alice")
        with caplog.at_level(logging.INFO):
            code, _ = await status_of(stub.ListExperts(swarm_pb2.ListExpertsRequest()))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "refused '/token_swarm.v1.SwarmService/ListExperts' of ipv4:127.0.0.1" in caplog.text
        assert token not in caplog.text
        async with channel_to(running, None, other) as second:
            await swarm_pb2_grpc.SwarmServiceStub(second).ListExperts(swarm_pb2.ListExpertsRequest())
