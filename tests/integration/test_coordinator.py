"""The public service over real gRPC, with toy experts behind real expert servers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import CoordinatorSettings
from token_swarm_server.coordinator.engine import Engine
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.coordinator.expert.link import ExpertLink, LinkOptions, LinkState
from token_swarm_server.coordinator.mixing_pool import MixingPool
from token_swarm_server.coordinator.recovery import Prompt
from token_swarm_server.coordinator.server import CoordinatorServer
from token_swarm_server.expert_server.server import ExpertServer
from token_swarm_server.telemetry.observer import Observer

from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Particle, Rule
from token_swarm.v1 import expert_pb2, swarm_pb2, swarm_pb2_grpc
from token_swarm.vocabulary import Vocabulary


@dataclass
class Running:
    stub: Any
    engine: Engine
    experts: dict[str, ToyExpert]
    address: str
    servers: dict[str, ExpertServer]


@asynccontextmanager
async def coordinator(tmp_path: Path, **options: Any) -> AsyncIterator[Running]:
    """Two experts and a coordinator, each behind its own gRPC server."""
    experts: dict[str, Any] = options.pop("experts", None) or toys([NESTED, LONG], max_context=200)
    servers = {name: ExpertServer(expert, f"unix:{tmp_path}/{name}.sock") for name, expert in experts.items()}
    for server in servers.values():
        await server.start()
    settings = load_settings(
        None,
        experts={name: {"address": server.address} for name, server in servers.items()},
        coordinator={"listen": "127.0.0.1:0", "particles": options.pop("particles", None), **options},
        cache=tmp_path / "cache",
    )
    engine = await Engine.connect({name: server.address for name, server in servers.items()}, settings)
    server = CoordinatorServer(settings, engine)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        try:
            yield Running(swarm_pb2_grpc.SwarmServiceStub(channel), engine, experts, server.address, servers)
        finally:
            await server.stop(0)
            for expert_server in servers.values():
                await expert_server.stop()


def mixture(weights: dict[str, float], rule: int = swarm_pb2.RULE_LOG_LINEAR) -> swarm_pb2.Mixture:
    entries = [swarm_pb2.ExpertWeight(expert=name, weight=weight) for name, weight in weights.items()]
    return swarm_pb2.Mixture(rule=rule, weights=entries)  # type: ignore[arg-type]


async def collect(call: Any) -> tuple[str, swarm_pb2.Finish]:
    text, finish = "", None
    async for message in call:
        assert finish is None
        if message.HasField("finish"):
            finish = message.finish
        else:
            assert message.chunk.text
            text += message.chunk.text
    assert finish is not None
    return text, finish


async def test_a_chat_names_the_experts_without_a_chat_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = toys([NESTED, LONG], max_context=200)
    specs = {name: replace(expert.spec, has_chat_template=name != "e1") for name, expert in experts.items()}
    monkeypatch.setattr(ToyExpert, "spec", property(lambda self: specs[self._spec.name]))
    async with coordinator(tmp_path, experts=experts) as running:
        listed = await running.stub.ListExperts(swarm_pb2.ListExpertsRequest())
        assert [each.has_chat_template for each in listed.experts] == [True, False]
        for weights, plain in (({"e0": 1.0, "e1": 1.0}, ["e1"]), ({"e0": 1.0}, [])):
            fields = {"prompt": "ab", "chat": True, "mixture": mixture(weights)}
            for _ in range(2):
                _, finish = await collect(running.stub.Generate(swarm_pb2.GenerateRequest(max_bytes=3, **fields)))
                assert list(finish.without_chat_template) == plain
            score = await running.stub.Score(swarm_pb2.ScoreRequest(text="ab", **fields))
            assert list(score.without_chat_template) == plain
        _, finish = await collect(running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=3)))
        assert list(finish.without_chat_template) == []
        lone = {"prompt": "ab", "chat": True, "mixture": mixture({"e1": 1.0})}
        for call in (
            running.stub.Score(swarm_pb2.ScoreRequest(text="ab", **lone)),
            collect(running.stub.Generate(swarm_pb2.GenerateRequest(**lone))),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="chat: e1: no chat template; ask without chat") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    said = [record for record in caplog.records if "no chat template" in record.message]
    assert [record.levelname for record in said] == ["WARNING"]
    assert "expert e1" in said[0].message


@pytest.mark.parametrize("rule", list(Rule))
async def test_the_stream_is_what_one_process_would_generate(tmp_path: Path, rule: Rule) -> None:
    weights = {"e0": 0.3, "e1": 0.7}
    async with coordinator(tmp_path) as running:
        for seed in range(4):
            request = swarm_pb2.GenerateRequest(
                prompt="cab",
                mixture=mixture(weights, swarm_pb2.RULE_LINEAR if rule is Rule.LINEAR else swarm_pb2.RULE_LOG_LINEAR),
                sampling=swarm_pb2.Sampling(temperature=0.9, seed=seed),
                max_bytes=60,
                stop=["abba"],
            )
            text, finish = await collect(running.stub.Generate(request))
            local = LocalEnsemble(toys([NESTED, LONG], max_context=200))
            decode = DecodeRequest(sampling=Sampling(0.9), seed=seed, max_bytes=60, stop=(b"abba",), draft_tokens=4)
            expected, own = local.generate("cab", Mixture(weights, rule), decode)
            assert text == expected
            assert finish.bytes == len(text.encode()) == own.length
            assert finish.reason == swarm_pb2.FinishReason.Value(f"FINISH_REASON_{own.reason.name}")
            assert finish.seed == seed
            assert finish.unit == swarm_pb2.UNIT_BYTE
            assert sum(use.share for use in finish.experts) == pytest.approx(1)
            for use in finish.experts:
                mine = own.experts[use.expert]
                assert (use.forwards, use.draft_tokens) == (mine.forwards, mine.drafted)
                assert use.accepted_draft_tokens == mine.accepted
            assert 0 <= finish.timings.queue_seconds <= finish.timings.total_seconds


async def test_eight_streams_share_batches_and_disturb_nobody(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running:
        requests = [
            swarm_pb2.GenerateRequest(prompt="ab" * (1 + i), sampling=swarm_pb2.Sampling(seed=i), max_bytes=40)
            for i in range(8)
        ]
        alone = [await collect(running.stub.Generate(request)) for request in requests]
        counts = running.engine.observer.counts.experts
        for own in counts.values():
            own.steps = own.submissions = 0
        together = await asyncio.gather(*(collect(running.stub.Generate(request)) for request in requests))
        assert [text for text, _ in together] == [text for text, _ in alone]
        assert max(own.submissions / own.steps for own in counts.values()) > 1.2
        await nothing_held(running)


async def nothing_held(running: Running) -> None:
    """Wait until no expert holds a sequence."""
    for _ in range(200):
        if not any(expert._held for expert in running.experts.values()):
            break
        await asyncio.sleep(0.01)
    assert not any(expert._held for expert in running.experts.values())
    assert running.engine.running == 0
    for name, expert in running.experts.items():
        assert running.engine.admission.free(name) == expert.spec.max_sequences


async def test_cancelling_frees_the_kv(tmp_path: Path) -> None:
    endless = {name: ToyExpert(name, v, seed=i, order=2) for i, (name, v) in enumerate([("e0", NESTED), ("e1", LONG)])}
    async with coordinator(tmp_path, experts=endless) as running:
        for _ in range(3):
            held = False
            for seed in range(20):
                call = running.stub.Generate(
                    swarm_pb2.GenerateRequest(
                        prompt="ab", max_bytes=500, sampling=swarm_pb2.Sampling(seed=seed, temperature=0.3)
                    )
                )
                await call.read()
                held = held or any(expert._held for expert in running.experts.values())
                call.cancel()
                await nothing_held(running)
            assert held


async def test_a_deadline_frees_the_kv(tmp_path: Path) -> None:
    vocabulary = Vocabulary((b"a", b"b", b"ab"), ())
    endless = {name: ToyExpert(name, vocabulary, seed=i) for i, name in enumerate(("e0", "e1"))}
    async with coordinator(tmp_path, experts=endless) as running:
        call = running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=100000), timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await nothing_held(running)


async def test_both_transports_give_the_same_text(tmp_path: Path) -> None:
    texts = {}
    for transport in (expert_pb2.TRANSPORT_INLINE, expert_pb2.TRANSPORT_SHARED_MEMORY):
        (tmp_path / str(transport)).mkdir()
        async with coordinator(tmp_path / str(transport)) as running:
            connections = {
                name: await ExpertConnection.connect(server.address, name, cache=tmp_path, prefer=transport)
                for name, server in running.servers.items()
            }
            assert {connection.transport for connection in connections.values()} == {transport}
            options = LinkOptions(tmp_path, chunk=32)
            links = {
                name: ExpertLink(connection, running.servers[name].address, options)
                for name, connection in connections.items()
            }
            engine = Engine(links, running.engine.ensemble, CoordinatorSettings(), Observer(), MixingPool(2))
            decode = DecodeRequest(seed=5, max_bytes=80)
            prompt = Prompt("ab", False, Mixture({"e0": 0.5, "e1": 0.5}))
            with engine.observer.request("generate") as watch:
                events = [event async for event in engine.generate(prompt, decode, watch)]
            texts[transport] = "".join(event for event in events if isinstance(event, str))
            await engine.close()
    assert len(set(texts.values())) == 1
    assert texts.popitem()[1]


async def test_score_is_what_one_process_would_say(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running:
        request = swarm_pb2.ScoreRequest(
            prompt="ab", text="cabcaab", mixture=mixture({"e0": 0.4, "e1": 0.6}), per_byte=True
        )
        response = await running.stub.Score(request)
        local = LocalEnsemble(toys([NESTED, LONG])).score("ab", "cabcaab", Mixture({"e0": 0.4, "e1": 0.6}))
        assert response.bytes == 7
        assert list(response.byte_log_probs) == pytest.approx(local.per_byte)
        assert response.log_prob == pytest.approx(local.log_prob)
        for expert in response.experts:
            assert list(expert.byte_log_probs) == pytest.approx(local.experts[expert.expert].per_byte)
            assert expert.token_log_prob == pytest.approx(local.experts[expert.expert].token_log_prob)
        response = await running.stub.Score(swarm_pb2.ScoreRequest(text="cab"))
        assert not response.byte_log_probs
        assert math.isfinite(response.log_prob)
        await nothing_held(running)


async def test_a_text_that_outgrows_a_context_is_scored_in_windows(tmp_path: Path) -> None:
    text = "cabcaab" * 90
    async with coordinator(tmp_path) as running:
        request = swarm_pb2.ScoreRequest(
            prompt="ab", text=text, mixture=mixture({"e0": 0.4, "e1": 0.6}), per_byte=True, stride=150
        )
        response = await running.stub.Score(request)
        local = LocalEnsemble(toys([NESTED, LONG], max_context=200))
        expected = local.score("ab", text, Mixture({"e0": 0.4, "e1": 0.6}), stride=150)
        assert response.bytes == len(text)
        assert list(response.byte_log_probs) == pytest.approx(expected.per_byte)
        assert response.stride == 150
        assert [(own.start, own.bytes, own.context_bytes) for own in response.windows] == [
            (own.start, own.length, own.context) for own in expected.windows
        ]
        assert len(response.windows) > 2
        response = await running.stub.Score(swarm_pb2.ScoreRequest(text=text))
        assert 0 < response.stride < len(text)
        assert not (await running.stub.Score(swarm_pb2.ScoreRequest(text="cab"))).windows
        with pytest.raises(grpc.aio.AioRpcError, match="stride: 0"):
            await running.stub.Score(swarm_pb2.ScoreRequest(text=text, stride=0))
        with pytest.raises(grpc.aio.AioRpcError, match=r"prompt: .* tokens of expert e0.*context of 200 tokens"):
            await running.stub.Score(swarm_pb2.ScoreRequest(prompt=text, text="cab"))
        await nothing_held(running)


SAMPLING = swarm_pb2.Sampling
BAD: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
    ({"particle": "none"}, grpc.StatusCode.NOT_FOUND, "particle named 'none'"),
    ({"mixture": mixture({"e9": 1.0})}, grpc.StatusCode.NOT_FOUND, "expert named 'e9'"),
    ({"mixture": mixture({})}, grpc.StatusCode.INVALID_ARGUMENT, "weights"),
    ({"mixture": mixture({"e0": 0.0, "e1": 0.0})}, grpc.StatusCode.INVALID_ARGUMENT, "weights"),
    ({"mixture": mixture({"e0": math.nan})}, grpc.StatusCode.INVALID_ARGUMENT, "weights[e0]"),
    ({"mixture": mixture({"e0": math.inf})}, grpc.StatusCode.INVALID_ARGUMENT, "weights[e0]"),
    (
        {"mixture": mixture({"e0": -1.0, "e1": 2.0}, swarm_pb2.RULE_LINEAR)},
        grpc.StatusCode.INVALID_ARGUMENT,
        "weights[e0]",
    ),
    ({"sampling": SAMPLING(temperature=-1.0)}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    ({"sampling": SAMPLING(temperature=math.nan)}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    ({"sampling": SAMPLING(top_p=0.0)}, grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
    ({"sampling": SAMPLING(min_p=1.5)}, grpc.StatusCode.INVALID_ARGUMENT, "min_p"),
    ({"max_bytes": 0}, grpc.StatusCode.INVALID_ARGUMENT, "max_bytes"),
    ({"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    ({"epsilon": 1.0}, grpc.StatusCode.INVALID_ARGUMENT, "epsilon"),
    ({"stop": [""]}, grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    ({"unit": swarm_pb2.UNIT_TOKEN}, grpc.StatusCode.INVALID_ARGUMENT, "unit"),
    ({"prompt": "a" * 300}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    ({"prompt": "xyz"}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
]


async def test_bad_requests_get_one_clear_status_and_the_server_lives_on(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running:
        for change, code, mention in BAD:
            request = swarm_pb2.GenerateRequest(**({"prompt": "ab", "max_bytes": 5} | change))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(running.stub.Generate(request))
            assert caught.value.code() is code, change
            assert mention in (caught.value.details() or ""), change
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                violation = error_details_pb2.BadRequest()
                status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
                assert status is not None
                assert status.details[0].Unpack(violation)
                assert violation.field_violations[0].field
        for request, field in (
            (swarm_pb2.ScoreRequest(text=""), "text"),
            (swarm_pb2.ScoreRequest(text="xyz"), "text"),
            (swarm_pb2.ScoreRequest(prompt="a" * 300, text="a"), "prompt"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: ") as caught:
                await running.stub.Score(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        text, _ = await collect(running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5)))
        assert len(text) <= 5
        await nothing_held(running)


async def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running, grpc.aio.insecure_channel(running.address) as channel:
        for method, stream in (("Generate", True), ("Score", False)):
            make = channel.unary_stream if stream else channel.unary_unary
            call = make(f"/token_swarm.v1.SwarmService/{method}")
            for data in (b"\x12\x02\xff\xfe", b"\xff\xff\xff"):  # field 2, a string, that is no UTF-8; no message
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    result = call(data)
                    await (result.read() if stream else result)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "UTF-8" in (caught.value.details() or "")


async def test_a_full_queue_is_resource_exhausted(tmp_path: Path) -> None:
    experts = toys([NESTED, LONG], max_sequences=2)
    async with coordinator(tmp_path, experts=experts, max_queue=1) as running:
        async with running.engine.admission.hold(["e0", "e1"], 2):
            waiting = asyncio.ensure_future(
                collect(running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5)))
            )
            while running.engine.admission.waiting == 0:
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5)))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            retry = error_details_pb2.RetryInfo()
            status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
            assert status is not None
            assert status.details[0].Unpack(retry)
        text, _ = await waiting
        assert len(text) <= 5
        await nothing_held(running)


async def test_particles_are_used_by_name_and_checked(tmp_path: Path) -> None:
    folder = tmp_path / "particles"
    good = Particle("good", Mixture({"e0": 1.0}), {"e0": NESTED.fingerprint}, utility="loglikelihood", dev_score=-1.0)
    good.save(folder / "good.json")
    Particle("other", Mixture({"e0": 1.0}), {"e0": "0" * 64}).save(folder / "other.json")
    async with coordinator(tmp_path, particles=folder) as running:
        listed = (await running.stub.ListParticles(swarm_pb2.ListParticlesRequest())).particles
        assert [(p.name, p.utility, p.dev_score) for p in listed] == [("good", "loglikelihood", -1.0), ("other", "", 0)]
        greedy = swarm_pb2.Sampling(temperature=0.0)
        named, finish = await collect(
            running.stub.Generate(
                swarm_pb2.GenerateRequest(prompt="ab", particle="good", max_tokens=30, sampling=greedy)
            )
        )
        given, _ = await collect(
            running.stub.Generate(
                swarm_pb2.GenerateRequest(prompt="ab", mixture=mixture({"e0": 1.0}), max_tokens=30, sampling=greedy)
            )
        )
        assert named == given
        assert [use.expert for use in finish.experts] == ["e0"]
        assert not finish.HasField("seed")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", particle="other")))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "'other'" in (caught.value.details() or "")


async def test_experts_health_and_a_lost_expert(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running, grpc.aio.insecure_channel(running.address) as channel:
        listed = (await running.stub.ListExperts(swarm_pb2.ListExpertsRequest())).experts
        assert [(e.name, e.group, e.architecture) for e in listed] == [("e0", 0, "toy"), ("e1", 1, "toy")]
        assert {e.state for e in listed} == {swarm_pb2.EXPERT_STATE_READY}
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="token_swarm.v1.SwarmService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await running.servers["e1"].stop()
        while running.engine.links["e1"].state is LinkState.READY:
            await asyncio.sleep(0.01)
        listed = (await running.stub.ListExperts(swarm_pb2.ListExpertsRequest())).experts
        assert [e.state for e in listed] == [swarm_pb2.EXPERT_STATE_READY, swarm_pb2.EXPERT_STATE_DOWN]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            failing = swarm_pb2.ON_EXPERT_FAILURE_FAIL
            await collect(
                running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5, on_expert_failure=failing))
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "'e1'" in (caught.value.details() or "")
        alone = swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5, mixture=mixture({"e0": 1.0}))
        await collect(running.stub.Generate(alone))
