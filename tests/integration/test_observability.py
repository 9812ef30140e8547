"""What a real server with toy experts says of itself: /metrics, GetStatus, top, log lines and traces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from token_swarm_server.config.loading import load_settings
from token_swarm_server.rpc.errors import ExpertUnavailable
from token_swarm_server.telemetry.metrics import PREFIX
from token_swarm_server.telemetry.sinks import Observability

from tests.integration.test_coordinator import Running, collect, coordinator, nothing_held
from tests.laws.ensembles import LONG, NESTED
from token_swarm.errors import BadParameter
from token_swarm.experts.contract import Op, StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.v1 import swarm_pb2

ANYWHERE = {"listen": "127.0.0.1:0"}
SECRET = "abbabacab"


async def scrape(running: Running) -> dict[tuple[str, ...], float]:
    """{(name, label values...): value} of the server's page."""
    metrics = running.engine.observer.metrics
    assert metrics is not None

    def fetch() -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{metrics.address}/metrics", timeout=5) as page:
            assert page.headers["Content-Type"].startswith("text/plain")
            return str(page.read().decode())

    samples: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(fetch)):
        for sample in family.samples:
            samples[sample.name.removeprefix(PREFIX), *sample.labels.values()] = sample.value
    return samples


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return caught.value


class Endless(ToyExpert):
    """A toy that takes two milliseconds for a step and never wants to end a text."""

    def step(self, ops: Sequence[Op]) -> StepResult:
        time.sleep(0.002)
        return super().step(ops)

    def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
        logits = super().law(tokens)
        logits[list(self.spec.vocabulary.eos_ids)] = -60.0
        return logits


def endless() -> dict[str, ToyExpert]:
    """Experts whose texts last as long as they may."""
    vocabularies = {"e0": NESTED, "e1": LONG}
    return {name: Endless(name, v, seed=i, order=2) for i, (name, v) in enumerate(vocabularies.items())}


async def test_metrics_and_status_agree_on_what_happened(tmp_path: Path) -> None:
    async with coordinator(tmp_path, metrics=ANYWHERE, max_queue=0) as running:
        requests = [
            swarm_pb2.GenerateRequest(prompt="cab", sampling=swarm_pb2.Sampling(seed=seed), max_bytes=30)
            for seed in range(3)
        ]
        finishes = [
            finish for _, finish in await asyncio.gather(*(collect(running.stub.Generate(r)) for r in requests))
        ]
        await running.stub.Score(swarm_pb2.ScoreRequest(prompt="c", text="abba"))
        await refused(running.stub.Generate(swarm_pb2.GenerateRequest(prompt="cab", max_bytes=0)))
        await nothing_held(running)
        found = await scrape(running)
        status = await running.stub.GetStatus(swarm_pb2.GetStatusRequest())

        written = sum(finish.bytes for finish in finishes)
        assert found["generation_bytes_total",] == status.requests.text_bytes == written
        assert found["prompt_bytes_total",] == status.requests.prompt_bytes == 3 * 3 + 5 + 3
        assert found["requests_received_total",] == status.requests.received == 5
        reasons = {swarm_pb2.FinishReason.Name(f.reason).removeprefix("FINISH_REASON_").lower() for f in finishes}
        assert sum(found["request_success_total", reason] for reason in reasons) == 3
        assert found["request_success_total", "scored"] == status.requests.succeeded["scored"] == 1
        assert found["request_failures_total", "INVALID_ARGUMENT"] == status.requests.failed["INVALID_ARGUMENT"] == 1
        assert found["time_to_first_byte_seconds_count",] == sum(status.requests.first_byte_seconds.counts) == 3
        assert found["e2e_request_latency_seconds_count",] == 4
        assert found["num_requests_running",] == found["num_requests_waiting",] == status.requests.running == 0
        for index, name in enumerate(("e0", "e1")):
            expert = status.experts[index]
            assert expert.expert == name
            assert expert.state == swarm_pb2.EXPERT_STATE_READY
            assert found["expert_step_seconds_count", name] == expert.steps > 0
            assert found["expert_step_tokens_sum", name] == expert.tokens > expert.steps / 2
            assert found["expert_transport_bytes_total", name] == expert.transport_bytes > 0
            assert found["expert_batch_size_sum", name] == expert.batched_sequences
            assert expert.compute_seconds <= expert.step_seconds
            assert found["generation_tokens_total", name] == sum(f.experts[index].tokens for f in finishes)
            assert found["expert_up", name] == 1
            assert found["expert_kv_sequences", name] == 0
            assert found["expert_kv_sequences_limit", name] == running.experts[name].spec.max_sequences
        assert found["process_resident_memory_bytes",] > 1e7
        metrics = running.engine.observer.metrics
    assert metrics is not None
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(urllib.request.urlopen, f"http://{metrics.address}/metrics", None, 2)


async def test_metrics_show_a_text_that_runs_and_one_that_is_cancelled(tmp_path: Path) -> None:
    async with coordinator(tmp_path, metrics=ANYWHERE, experts=endless()) as running:
        call = running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5000))
        # Some chunks: the first bytes may still be inside a token.
        for _ in range(20):
            await call.read()
        found = await scrape(running)
        assert found["num_requests_running",] == 1
        assert found["expert_kv_sequences", "e0"] >= 1
        assert found["request_queue_time_seconds_count",] == 1
        call.cancel()
        await nothing_held(running)
        found = await scrape(running)
        assert found["num_requests_running",] == 0
        assert found["request_failures_total", "CANCELLED"] == 1
        # Its work counts in bytes and in tokens alike, the request as a whole in neither length nor latency.
        assert found["generation_bytes_total",] > 0
        assert found["generation_tokens_total", "e0"] > 0
        assert found["request_generation_bytes_count",] == found["e2e_request_latency_seconds_count",] == 0
        late = running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5000), timeout=0.2)
        assert (await refused(late)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await nothing_held(running)
        assert (await scrape(running))["request_failures_total", "DEADLINE_EXCEEDED"] == 1


async def test_metrics_show_an_expert_that_is_lost(tmp_path: Path) -> None:
    async with coordinator(tmp_path, metrics=ANYWHERE) as running:
        await running.servers["e1"].stop()
        for _ in range(100):
            found = await scrape(running)
            # Counted a moment after the expert no longer takes work.
            if found["expert_lost_total", "e1"]:
                break
            await asyncio.sleep(0.02)
        assert (found["expert_up", "e0"], found["expert_up", "e1"]) == (1, 0)
        assert found["expert_lost_total", "e1"] == 1
        assert ("expert_kv_sequences", "e1") not in found
        status = await running.stub.GetStatus(swarm_pb2.GetStatusRequest())
        assert status.experts[1].state == swarm_pb2.EXPERT_STATE_DOWN
        assert status.experts[1].reason
        assert not status.experts[1].HasField("kv_tokens")


async def test_a_request_is_logged_under_the_id_that_its_caller_gets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "token_swarm_server.requests")
    async with coordinator(tmp_path) as running:
        good = running.stub.Generate(swarm_pb2.GenerateRequest(request_id="job 7\r\n", prompt=SECRET, max_bytes=5))
        bad = running.stub.Generate(swarm_pb2.GenerateRequest(prompt=SECRET, max_bytes=0))
        score = running.stub.Score(swarm_pb2.ScoreRequest(request_id="s", text=SECRET))
        ids = [dict(await call.initial_metadata())["x-request-id"] for call in (good, bad, score)]
        text, _ = await collect(good)
        await refused(bad)
        await score
        await nothing_held(running)
    assert (ids[0], ids[2]) == ("job7", "s")
    lines = {
        record.fields["request_id"]: record.fields for record in caplog.records if record.name.endswith("requests")
    }
    assert lines.keys() == set(ids)
    assert lines["job7"]["status"] == lines["s"]["status"] == "OK"
    assert lines["job7"]["bytes"] == len(text.encode())  # no seed was given: it may end before its limit
    assert set(lines["job7"]["experts"]) == {"e0", "e1"}
    assert lines["s"]["reason"] == "scored"
    assert lines[ids[1]]["status"] == "INVALID_ARGUMENT"
    assert SECRET not in json.dumps(list(lines.values()))


async def test_top_reads_a_running_server(tmp_path: Path) -> None:
    async with coordinator(tmp_path, experts=endless()) as running:
        call = running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", max_bytes=5000))
        reading = asyncio.create_task(read(call))
        command = [sys.executable, "-m", "token_swarm_server.cli", "top", "--address", running.address]

        async def top(*flags: str) -> str:
            process = await asyncio.create_subprocess_exec(
                *command, "--once", "--interval", "0.3", *flags, stdout=asyncio.subprocess.PIPE
            )
            out, _ = await process.communicate()
            assert process.returncode == 0
            return out.decode()

        while not running.engine.running:
            await asyncio.sleep(0.01)
        shown, figures = await asyncio.gather(top(), top("--json"))
        assert "1 running, 0 waiting" in shown
        now = json.loads(figures)
        assert now["requests"]["running"] == 1
        assert now["requests"]["text_bytes_per_second"] > 0
        assert now["requests"]["inter_chunk_seconds"]["p50"] > 0
        assert [expert["expert"] for expert in now["experts"]] == ["e0", "e1"]
        assert all(expert["steps_per_second"] > 0 for expert in now["experts"])
        call.cancel()
        await reading


async def read(call: Any) -> None:
    """Read a text until it is cancelled."""
    with contextlib.suppress(asyncio.CancelledError):
        async for _ in call:
            pass


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += [span for of in request.resource_spans for scope in of.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@asynccontextmanager
async def otlp_collector() -> AsyncIterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_collector_gets_the_trace_that_the_caller_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise http_proxy in the environment diverts loopback connections.
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with otlp_collector() as (collector, endpoint):
        async with coordinator(tmp_path, tracing={"endpoint": endpoint}) as running:
            metadata = (("traceparent", f"00-{trace}-{parent}-01"),)
            request = swarm_pb2.GenerateRequest(request_id="job", prompt=SECRET, max_bytes=9)
            _, finish = await collect(running.stub.Generate(request, metadata=metadata))
            await nothing_held(running)
        # The server has sent what was left when it stopped.
        spans = {span.name: span for span in collector.spans}
    assert spans.keys() == {"token_swarm.generate", "token_swarm.expert e0", "token_swarm.expert e1"}
    top = spans["token_swarm.generate"]
    assert {span.trace_id.hex() for span in spans.values()} == {trace}
    assert top.parent_span_id.hex() == parent
    for index, name in enumerate(("e0", "e1")):
        span = spans[f"token_swarm.expert {name}"]
        given = {item.key: item.value for item in span.attributes}
        assert span.parent_span_id == top.span_id
        assert given["token_swarm.calls"].int_value > 0
        assert given["token_swarm.tokens"].int_value == finish.experts[index].tokens
        busy = sum(given[f"token_swarm.{part}_seconds"].double_value for part in ("queue", "compute", "transport"))
        assert 0 < busy * 1e9 <= span.end_time_unix_nano - span.start_time_unix_nano
    given = {item.key: item.value for item in top.attributes}
    assert given["token_swarm.request_id"].string_value == "job"
    assert given["token_swarm.bytes"].int_value == finish.bytes
    assert not any(SECRET in str(span) for span in spans.values())


async def test_a_metrics_port_in_use_is_refused_by_name(tmp_path: Path) -> None:
    async with coordinator(tmp_path, metrics=ANYWHERE) as running:
        metrics = running.engine.observer.metrics
        assert metrics is not None
        settings = load_settings(
            None, experts={"a": {"address": "unix:/nowhere"}}, coordinator={"metrics": {"listen": metrics.address}}
        )
        with pytest.raises(BadParameter, match=r"coordinator\.metrics\.listen: .* free to listen on"):
            Observability(settings).start({})


async def test_a_scrape_waits_for_no_expert_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("token_swarm_server.telemetry.status.STATS_SECONDS", 0.1)
    async with coordinator(tmp_path, metrics=ANYWHERE) as running:

        async def never() -> None:
            await asyncio.sleep(60)
            raise ExpertUnavailable("e0", "never")

        monkeypatch.setattr(running.engine.links["e0"], "stats", never)
        found = await scrape(running)
        assert ("expert_kv_sequences", "e0") not in found
        assert found["expert_kv_sequences", "e1"] == 0


def test_tracing_without_opentelemetry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "token_swarm_server.telemetry.tracing", None)
    tracing = {"endpoint": "http://127.0.0.1:4317"}
    settings = load_settings(None, experts={"a": {"address": "unix:/nowhere"}}, coordinator={"tracing": tracing})
    with pytest.raises(BadParameter, match=r"coordinator\.tracing\.endpoint: .*pip install 'token-swarm\[tracing\]'"):
        Observability(settings)


@pytest.mark.parametrize(
    ("coordinator_settings", "message"),
    [
        ({"metrics": {"listen": "0.0.0.0:9464"}}, "can be reached from other machines"),
        ({"metrics": {"listen": "unix:/tmp/x"}}, "must be host:port"),
        ({"tracing": {"endpoint": "localhost:4317"}}, "must be http://host:port"),
        ({"tracing": {"sample": 1.5}}, "less than or equal to 1"),
    ],
)
def test_bad_settings_are_refused(coordinator_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(None, experts={"a": {"address": "unix:/nowhere"}}, coordinator=coordinator_settings)
