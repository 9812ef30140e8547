"""Who is let in and who is not, over real gRPC, with certificates that are made for the test."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import socket
import ssl
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from token_swarm_server import auth
from token_swarm_server.channels import open_blocking_channel, open_channel
from token_swarm_server.cli import app
from token_swarm_server.config import load_settings
from token_swarm_server.coordinator import CoordinatorServer
from token_swarm_server.engine import Engine
from token_swarm_server.expert_client import ExpertConnection
from token_swarm_server.expert_server import ExpertServer
from token_swarm_server.grpc_host import Access
from token_swarm_server.launcher import LaunchError, launch
from token_swarm_server.logs import JsonFormatter, TextFormatter
from token_swarm_server.settings import ClientTls, ServerTls
from token_swarm_server.tokens import PREFIX, create_token, digest, revoke_token
from token_swarm_server.transport import SegmentWriter
from typer.testing import CliRunner

from tests.integration.test_coordinator import Running, collect, coordinator
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.mixing.shaping import Shaping
from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import expert_pb2, swarm_pb2, swarm_pb2_grpc

SERVICE = "/token_swarm.v1.SwarmService"
REQUEST = swarm_pb2.GenerateRequest(prompt="cab", sampling=swarm_pb2.Sampling(seed=1), max_bytes=12)
# With grpc's pool, a client without a certificate might travel in the connection of one that has one.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
# How a handshake that fails looks to grpc: the call never came to be, so no server could give it a status.
NO_CONNECTION = grpc.StatusCode.UNAVAILABLE


class Pki:
    """An authority and the certificates it has signed, as PEM files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, file: str, *names: str, common_name: str | None = None) -> dict[str, str]:
        """Make FILE.pem and FILE.key; their paths by what settings call them."""
        issued = self._authority.issue_cert(*names, common_name=common_name)
        certificate, key = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return {"certificate": str(certificate), "key": str(key)}

    def client(self, file: str, *names: str, common_name: str | None = None) -> ClientTls:
        return ClientTls.model_validate({"ca": self.ca, **self.issue(file, *names, common_name=common_name)})


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> Pki:
    """Another authority, which the servers do not know."""
    return Pki(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module")
def server(pki) -> dict[str, Any]:
    return pki.issue("server", "127.0.0.1", "localhost")


@pytest.fixture
def tokens(tmp_path) -> Path:
    return tmp_path / "tokens.json"


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
        DecodeRequest(shaping=Shaping(1.0), seed=1, max_bytes=12, epsilon=0.1),
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

    monkeypatch.setattr("token_swarm_server.launcher.CONNECT_SECONDS", 1.0)
    tls = ServerTls.model_validate({**server, "client_ca": pki.ca})
    async with distant_experts(Access(tls)) as servers:
        expert = {"address": servers["e0"].address, "tls": {"ca": str(pki.ca)}}
        settings = load_settings(None, experts={"e0": expert})
        with pytest.raises(LaunchError, match=r"experts.e0.address: no expert answers .*Socket closed"):
            async with launch(settings, {}, console=Console(quiet=True)):
                pass


# Files and sockets.


@contextmanager
def permissive_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


async def test_sockets_and_shared_memory_are_private_whatever_the_umask(tmp_path):
    with permissive_umask():
        expert = ExpertServer(toys([NESTED], max_context=50)["e0"], f"unix:{tmp_path}/run/expert.sock")
        await expert.start()
        try:
            assert os.umask(0) == 0
            path = tmp_path / "run" / "expert.sock"
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        finally:
            await expert.stop()
        async with coordinator(tmp_path, listen=f"unix:{tmp_path}/public/s") as running:
            path = tmp_path / "public" / "s"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert running.address == f"unix:{path}"
        segment = SegmentWriter(tmp_path, 64)
        try:
            assert stat.S_IMODE((tmp_path / segment.name).stat().st_mode) == 0o600
        finally:
            segment.unlink()
            segment.close()


# What a request holds is never more than text.


async def test_text_of_a_request_reaches_no_path_no_format_and_no_log_line_of_its_own(tmp_path, caplog):
    particles = tmp_path / "particles"
    particles.mkdir()
    (tmp_path / "secret.json").write_text(json.dumps({"name": "secret"}))
    before = sorted(tmp_path.rglob("*"))
    hostile = (
        "../secret",
        "/etc/passwd",
        "secret.json\0",
        "%s%s%n %(name)s {0} {self} $(id) `id` ; id",
        "first\nERROR a line of its own\r\n",
        "\x1b]0;title\x07\x1b[2J",
        "\u2028\u202e\ufeff",
        "x" * 100_000,
    )
    async with coordinator(tmp_path, particles=str(particles)) as running:
        with caplog.at_level(logging.DEBUG, "token_swarm_server"):
            stub = running.stub
            for text in hostile:
                weights = swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert=text, weight=1)])
                no_weight = swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert=text, weight=math.nan)])
                requests = {
                    "NOT_FOUND": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", particle=text),
                    "NOT_FOUND ": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", mixture=weights),
                    "INVALID_ARGUMENT": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", mixture=no_weight),
                    "OK": swarm_pb2.GenerateRequest(request_id=text, prompt="cab", stop=[text], max_bytes=3),
                    # Toy experts know few letters.
                    "INVALID_ARGUMENT ": swarm_pb2.GenerateRequest(request_id=text, prompt=text, max_bytes=3),
                }
                for code, request in requests.items():
                    call = stub.Generate(request, metadata=(("traceparent", "%s {0}"),))
                    with suppress(grpc.aio.AioRpcError):
                        await collect(call)
                    assert (await call.code()).name == code.strip(), text[:80]
                score = stub.Score(swarm_pb2.ScoreRequest(request_id=text, text="abc", particle=text))
                assert (await status_of(score))[0] is grpc.StatusCode.NOT_FOUND
    own = [record for record in caplog.records if record.name.startswith("token_swarm")]
    assert len(own) >= 5 * len(hostile)
    for record in own:
        for formatter in (TextFormatter(), JsonFormatter()):
            line = formatter.format(record)
            assert line.isprintable(), line[:200]
            assert len(line) < 2_000
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "cache" not in path.parts]
    assert all(re.fullmatch(r"e\d\.sock", path.name) for path in made), made


async def test_the_name_of_a_method_cannot_forge_a_log_line(tmp_path, tokens, caplog):
    create_token(tokens, "alice")
    async with coordinator(tmp_path, tokens=str(tokens)) as running, channel_to(running, None) as channel:
        with caplog.at_level(logging.INFO):
            for method in ("/a%s%n{0}/b", f"/{'x' * 4000}/y"):
                code, _ = await status_of(channel.unary_unary(method)(b""))
                assert code is grpc.StatusCode.UNAUTHENTICATED
    lines = [record.getMessage() for record in caplog.records if record.name == "token_swarm_server.auth"]
    assert len(lines) == 2
    assert all(line.isprintable() and len(line) < 200 for line in lines)


# The command line.


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, pki, server) -> Iterator[tuple[str, str, Path]]:
    """A coordinator in a thread of its own that asks for a token over TLS: its address, a token, and a file with it."""
    folder = tmp_path_factory.mktemp("guarded")
    token = create_token(folder / "tokens.json", "alice")
    (folder / "token").write_text(f"{token}\n")
    addresses: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        try:
            async with coordinator(folder, tls=server, tokens=str(folder / "tokens.json")) as running:
                addresses.append(running.address)
                ready.set()
                await stop.wait()
        finally:
            ready.set()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    assert addresses, "the coordinator did not start"
    yield addresses[0], token, folder / "token"
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(30)


def run(*arguments: str, **environment: str | None):
    clean = {name: None for name in os.environ if name.startswith("TOKEN_SWARM_")}
    return CliRunner().invoke(app, arguments, env=clean | environment)


def test_commands_show_a_token_over_tls(guarded, pki):
    address, token, file = guarded
    ca = ("--tls-ca", str(pki.ca))
    text = ("--prompt", "cab", "--seed", "1", "--max-bytes", "12")
    result = run("generate", "--address", address, *text, *ca, "--token-file", str(file))
    assert (result.exit_code, result.stdout) == (0, text_of_one_process()), result.stderr
    # The same out of the environment.
    variables = {"TOKEN_SWARM_TOKEN": token, "TOKEN_SWARM_TLS_CA": str(pki.ca)}
    result = run("score", "--address", address, "--text", "abc", "--json", **variables)
    assert result.exit_code == 0, result.stderr
    variables = {"TOKEN_SWARM_TOKEN_FILE": str(file), "TOKEN_SWARM_TLS_CA": str(pki.ca)}
    assert run("particles", "--address", address, "--json", **variables).exit_code == 0
    assert run("health", "--address", address, *ca).exit_code == 0


def test_commands_say_what_is_wrong_with_credentials(guarded, pki, strangers, tmp_path):
    address, _, file = guarded
    ca = ("--tls-ca", str(pki.ca))
    (tmp_path / "wrong").write_text(PREFIX + "wrong")
    said = {
        ca: "a valid bearer token is needed",
        (*ca, "--token-file", str(tmp_path / "wrong")): "the one given is not",
        ("--token-file", str(file)): "it may want TLS (--tls-ca, or --tls)",
        ("--tls-ca", str(strangers.ca), "--token-file", str(file)): "not from an authority of --tls-ca",
        ("--tls", "--token-file", str(file)): "not from an authority of --tls-ca",
        (*ca, "--token-file", str(tmp_path / "none")): "--token-file: ",
        ("--tls-ca", str(file)): "--tls-ca: ",
    }
    for flags, message in said.items():
        result = run("particles", "--address", address, *flags)
        assert (result.exit_code, result.stdout) == (2, ""), flags
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert file.read_text().strip() not in result.stderr


def test_other_programs_show_a_token_as_the_docs_say(guarded, pki):
    address, token, _ = guarded
    tls = grpc.ssl_channel_credentials(pki.ca.read_bytes())
    credentials = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token))
    with grpc.secure_channel(address, credentials) as channel:
        stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
        assert "".join(each.chunk.text for each in stub.Generate(REQUEST)) == text_of_one_process()


def test_a_search_shows_its_token_too(guarded, pki):
    from token_swarm_server.search_remote import RemoteEnsemble

    from token_swarm.search.utility import UtilityUnavailable

    address, token, _ = guarded
    tls = ClientTls(ca=pki.ca)
    with RemoteEnsemble(address, tls=tls, token=token) as remote:
        assert set(remote.keys()) == {"e0", "e1"}
    with RemoteEnsemble(address, tls=tls) as remote, pytest.raises(UtilityUnavailable, match="refuses: a valid bearer"):
        remote.keys()
