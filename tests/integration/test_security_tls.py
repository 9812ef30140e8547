"""Who can connect over TLS and mutual TLS, to a coordinator and to distant experts, over real gRPC."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import ClientTls, ServerTls
from token_swarm_server.coordinator.engine import Engine
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.coordinator.server import CoordinatorServer
from token_swarm_server.expert_server.server import ExpertServer
from token_swarm_server.launch.launcher import LaunchError, launch
from token_swarm_server.rpc import auth
from token_swarm_server.rpc.bearer_tokens import create_token
from token_swarm_server.rpc.channels import open_channel
from token_swarm_server.rpc.host import Access

from tests.integration.guarded_calls import (
    NO_CONNECTION,
    REQUEST,
    channel_to,
    every_call,
    status_of,
    text_of_one_process,
)
from tests.integration.test_coordinator import collect, coordinator
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.v1 import expert_pb2, swarm_pb2, swarm_pb2_grpc

# Mutual TLS.


async def test_only_clients_of_the_authority_can_connect(tmp_path, pki, strangers, server):
    clients = {
        "none": ClientTls(ca=pki.ca),
        "of another authority": ClientTls(
            ca=pki.ca, certificate=strangers.folder / "c.pem", key=strangers.folder / "c.key"
        ),
    }
    strangers.issue("c", "alice.example")
    async with coordinator(tmp_path, tls={**server, "client_ca": str(pki.ca)}) as running:
        for tls in clients.values():
            async with channel_to(running, tls) as channel:
                for call in every_call(running.address, tls, channel).values():
                    assert (await status_of(call))[0] is NO_CONNECTION
                health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert (await status_of(health))[0] is NO_CONNECTION
        async with channel_to(running, pki.client("c", "alice.example")) as channel:
            text, _ = await collect(swarm_pb2_grpc.SwarmServiceStub(channel).Generate(REQUEST))
            assert text == text_of_one_process()


async def test_a_certificate_with_another_name_is_unauthenticated(tmp_path, pki, server):
    tls = {**server, "client_ca": str(pki.ca), "client_names": ["alice.example", "carol.example"]}
    async with coordinator(tmp_path, tls=tls) as running:
        for name in ("bob.example", "alice.example.evil", "*.example"):
            other = pki.client("other", name)
            async with channel_to(running, other) as channel:
                calls = every_call(running.address, other, channel)
                answers = {what: await status_of(call) for what, call in calls.items()}
                assert set(answers.values()) == {(grpc.StatusCode.UNAUTHENTICATED, auth.NAME_NEEDED)}, answers
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        common_name = pki.client("common", "bob.example", common_name="alice.example")
        async with channel_to(running, common_name) as channel:
            call = swarm_pb2_grpc.SwarmServiceStub(channel).ListExperts(swarm_pb2.ListExpertsRequest())
            assert await status_of(call) == (grpc.StatusCode.UNAUTHENTICATED, auth.NAME_NEEDED)
        assert all(own.steps == 0 for own in running.engine.observer.counts.experts.values())
        for names in (("carol.example",), ("x.example", "alice.example")):
            right = pki.client("right", *names)
            async with channel_to(running, right) as channel:
                calls = every_call(running.address, right, channel)
                codes = {name: (await status_of(calls.pop(name)))[0] for name in ("no message", "no method")}
                assert codes["no message"] is grpc.StatusCode.INVALID_ARGUMENT
                assert len(await calls.pop("reflection")) == 3
                assert (await collect(calls.pop("Generate")))[0] == text_of_one_process()
                await asyncio.gather(*calls.values())


async def test_a_token_and_a_certificate_are_both_needed_where_both_are_asked_for(tmp_path, pki, server, tokens):
    token = create_token(tokens, "alice")
    tls = {**server, "client_ca": str(pki.ca), "client_names": ["alice.example"]}
    async with coordinator(tmp_path, tls=tls, tokens=str(tokens)) as running:
        right, other = pki.client("right", "alice.example"), pki.client("other", "bob.example")
        request = swarm_pb2.ListExpertsRequest()
        for client, shown, said in ((right, None, auth.TOKEN_NEEDED), (other, token, auth.NAME_NEEDED)):
            async with channel_to(running, client, shown) as channel:
                answer = await status_of(swarm_pb2_grpc.SwarmServiceStub(channel).ListExperts(request))
                assert answer == (grpc.StatusCode.UNAUTHENTICATED, said)
        async with channel_to(running, right, token) as channel:
            await swarm_pb2_grpc.SwarmServiceStub(channel).ListExperts(request)


async def test_clients_that_do_not_encrypt_or_do_not_know_the_server_get_nowhere(tmp_path, pki, strangers, server):
    request = swarm_pb2.ListExpertsRequest()
    async with coordinator(tmp_path, tls=server) as running:
        for tls in (None, ClientTls(ca=strangers.ca), ClientTls()):
            async with channel_to(running, tls) as channel:
                code, _ = await status_of(swarm_pb2_grpc.SwarmServiceStub(channel).ListExperts(request))
                assert code is NO_CONNECTION
    elsewhere = pki.issue("elsewhere", "elsewhere.example")
    async with (
        coordinator(tmp_path, tls=elsewhere) as running,
        channel_to(running, ClientTls(ca=pki.ca)) as channel,
    ):
        code, _ = await status_of(swarm_pb2_grpc.SwarmServiceStub(channel).ListExperts(request))
        assert code is NO_CONNECTION


def shown_certificate(address: str, ca: Path) -> bytes | None:
    """The certificate that the server at `address` shows to a new connection."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True)


async def test_a_renewed_certificate_is_used_without_a_restart(tmp_path, pki, caplog):
    files = pki.issue("renewed", "127.0.0.1")
    key = pki.folder / "renewed.key"
    async with coordinator(tmp_path, tls=files) as running:
        first = await asyncio.to_thread(shown_certificate, running.address, pki.ca)
        # Half of the renewal: the old pair stays in use, and the log says why.
        old = key.read_bytes()
        pki.issue("renewed", "127.0.0.1")
        new = key.read_bytes()
        key.write_bytes(old)
        assert await asyncio.to_thread(shown_certificate, running.address, pki.ca) == first
        assert "the old certificate stays in use" in caplog.text
        key.write_bytes(new)
        assert await asyncio.to_thread(shown_certificate, running.address, pki.ca) != first


# Experts on another machine.


@asynccontextmanager
async def distant_experts(access: Access) -> AsyncIterator[dict[str, ExpertServer]]:
    """The experts of `coordinator`, over TCP; what is put in the place of one is stopped in the end as well."""
    servers = {
        name: ExpertServer(expert, "127.0.0.1:0", access=access)
        for name, expert in toys([NESTED, LONG], max_context=200).items()
    }
    try:
        for server in servers.values():
            await server.start()
        yield servers
    finally:
        for server in servers.values():
            await server.stop()


async def test_experts_are_reached_over_mutual_tls(tmp_path, pki, strangers, server):
    tls = ServerTls.model_validate({**server, "client_ca": pki.ca, "client_names": ["coordinator.example"]})
    right = pki.client("coordinator", "coordinator.example")
    async with distant_experts(Access(tls)) as servers:
        addresses = {name: server.address for name, server in servers.items()}
        settings = load_settings(
            None,
            experts={name: {"address": address, "tls": right.model_dump()} for name, address in addresses.items()},
            coordinator={"listen": f"unix:{tmp_path}/s"},
            cache=tmp_path / "cache",
        )
        engine = await Engine.connect(addresses, settings)
        coordinator = CoordinatorServer(settings, engine)
        await coordinator.start()
        try:
            async with open_channel(coordinator.address) as channel:
                stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
                assert (await collect(stub.Generate(REQUEST)))[0] == text_of_one_process()
                # The way back to an expert that was away is the same.
                await servers["e0"].stop()
                again = toys([NESTED, LONG], max_context=200)["e0"]
                servers["e0"] = ExpertServer(again, addresses["e0"], access=Access(tls))
                await servers["e0"].start()
                assert (await collect(stub.Generate(REQUEST)))[0] == text_of_one_process()
                assert engine.links["e0"].restarts == 1
        finally:
            await coordinator.stop(0)
        address = addresses["e0"]
        connection = await ExpertConnection.connect(
            address, "e0", cache=tmp_path, tls=right, prefer=expert_pb2.TRANSPORT_INLINE
        )
        assert connection.transport == expert_pb2.TRANSPORT_INLINE
        await connection.close()
        strangers.issue("c", "coordinator.example")
        stranger = ClientTls(ca=pki.ca, certificate=strangers.folder / "c.pem", key=strangers.folder / "c.key")
        for wrong in (None, ClientTls(ca=pki.ca), stranger, pki.client("other", "bob.example")):
            with pytest.raises(Exception, match="expert 'e0' is unavailable"):
                await ExpertConnection.connect(address, "e0", cache=tmp_path, tls=wrong, wait_seconds=0.5)


async def test_a_distant_expert_that_cannot_be_talked_to_is_named_with_the_reason(pki, server, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("token_swarm_server.launch.launcher.CONNECT_SECONDS", 1.0)
    tls = ServerTls.model_validate({**server, "client_ca": pki.ca})
    async with distant_experts(Access(tls)) as servers:
        expert = {"address": servers["e0"].address, "tls": {"ca": str(pki.ca)}}
        settings = load_settings(None, experts={"e0": expert})
        with pytest.raises(LaunchError, match=r"experts.e0.address: no expert answers .*Socket closed"):
            async with launch(settings, {}, console=Console(quiet=True)):
                pass
