"""What an observer tells its sinks, and what metrics, logs, traces, GetStatus and the dashboard make of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import promql_parser
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from token_swarm_server.cli.rates import quantile, rates
from token_swarm_server.cli.top import view
from token_swarm_server.counts import INTER_BYTE_SECONDS, Counts, Histogram
from token_swarm_server.errors import ExpertUnavailable, QueueFull
from token_swarm_server.logs import JsonFormatter, LineLog, RequestLog, TextFormatter
from token_swarm_server.metrics import PREFIX, SwarmCollector
from token_swarm_server.observer import Observer, Outcome, Sink, Step, Watch, request_id
from token_swarm_server.status import LiveExpert, status_to_proto
from token_swarm_server.tracing import TraceSink

from token_swarm.errors import BadParameter
from token_swarm.experts.contract import ExpertStats
from token_swarm.v1 import swarm_pb2

ROOT = Path(__file__).parents[2]
LIVE = {
    "a": LiveExpert("ready", "", 2, 3, 16, ExpertStats(sequences=4, tokens=50, capacity=200, engine={"waiting": 7.0})),
    "b": LiveExpert("down", "exited with code -9", 0, 0, 8, None),
}


def a_text(observer: Observer, *, error: BaseException | None = None, **call: Any) -> Watch:
    """A request with one call to each expert, two chunks, and the end that `error` says."""
    call.setdefault("kind", "generate")
    watch = observer.request(call.pop("kind"), prompt_bytes=10, **call)
    with contextlib.suppress(Exception, asyncio.CancelledError), watch:
        watch.planned("linear", "byte", {"a": 0.3, "b": 0.7})
        watch.encoded({"a": 4, "b": 5})
        watch.admitted()
        watch.forward("a", 0.1, 0.2, 0.3, 7)
        watch.mixed(0.001)
        watch.text(3)
        watch.text(2)
        if error is not None:
            raise error
        watch.finished(Outcome("max_bytes", {"a": 2, "b": 1}, {"a": 0.25, "b": 0.75}, ("b",), 1))
    return watch


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1", "abc-1"), ("a b\nc\x00é%s", "abc%s"), ("x" * 100, "x" * 64), ("\x7f\u2028id", "id")],
)
def test_a_request_id_is_safe_in_logs_and_metadata(given: str, kept: str) -> None:
    assert request_id(given) == kept


def test_a_request_without_an_id_gets_one() -> None:
    assert request_id("") != request_id("\n") != ""


@pytest.mark.parametrize(
    ("error", "remaining", "status"),
    [
        (None, None, "OK"),
        (BadParameter("max_bytes", 0, "at least 1"), None, "INVALID_ARGUMENT"),
        (QueueFull("64 wait"), None, "RESOURCE_EXHAUSTED"),
        (ExpertUnavailable("a", "it died"), None, "UNAVAILABLE"),
        (RuntimeError("a bug"), None, "INTERNAL"),
        (asyncio.CancelledError(), None, "CANCELLED"),
        (asyncio.CancelledError(), 100.0, "CANCELLED"),
        (asyncio.CancelledError(), 0.0, "DEADLINE_EXCEEDED"),
    ],
)
def test_a_request_ends_with_the_status_of_what_ended_it(
    error: BaseException | None, remaining: float | None, status: str
) -> None:
    counts = Counts(["a", "b"])
    watch = a_text(Observer([counts]), error=error, time_remaining=remaining)
    assert watch.status == status
    assert watch.error == ("" if error is None else type(error).__name__)
    assert counts.requests.failed == ({} if error is None else {status: 1})
    assert counts.requests.succeeded["max_bytes"] == (error is None)
    assert (counts.requests.running, counts.requests.waiting) == (0, 0)


def test_a_reader_that_leaves_with_the_last_message_was_served() -> None:
    watch = Observer().request("generate")
    with pytest.raises(asyncio.CancelledError), watch:
        watch.finished(Outcome("end_of_text"))
        raise asyncio.CancelledError
    assert (watch.status, watch.error) == ("OK", "")


def test_running_and_waiting_follow_a_request() -> None:
    counts = Counts(["a"])
    seen = []
    with Observer([counts]).request("generate") as watch:
        seen.append((counts.requests.waiting, counts.requests.running))
        watch.admitted()
        seen.append((counts.requests.waiting, counts.requests.running))
    assert seen == [(1, 0), (0, 1)]
    with pytest.raises(QueueFull), Observer([counts]).request("generate"):
        raise QueueFull("full")
    assert (counts.requests.waiting, counts.requests.running) == (0, 0)


def test_a_sink_that_breaks_spoils_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Sink):
        def request_finished(self, watch: Watch) -> None:
            raise RuntimeError("no")

    counts = Counts(["a", "b"])
    assert a_text(Observer([Broken(), counts])).status == "OK"
    assert counts.requests.succeeded["max_bytes"] == 1
    assert "Broken could not record request" in caplog.text


def test_a_histogram_counts_like_prometheus_own() -> None:
    own = Histogram(INTER_BYTE_SECONDS)
    theirs = TheirHistogram("x", "x", buckets=INTER_BYTE_SECONDS, registry=None)
    for value in [*INTER_BYTE_SECONDS, *np.random.default_rng(0).lognormal(-3, 3, 500)]:
        own.add(value)
        theirs.observe(value)
    samples = [sample.value for sample in theirs.collect()[0].samples if sample.name == "x_bucket"]
    assert list(np.cumsum(own.counts)) == samples
    assert own.sum == pytest.approx(theirs._sum.get())


def test_quantiles_are_those_of_prometheus() -> None:
    bounds, counts = (1.0, 2.0, 4.0), [10, 0, 10, 5]
    assert quantile(bounds, counts, 0.2) == pytest.approx(0.5)
    assert quantile(bounds, counts, 0.5) == pytest.approx(2.5)
    assert quantile(bounds, counts, 0.99) == 4.0
    assert quantile(bounds, [0, 0, 0, 0], 0.5) is None


def exposed(counts: Counts, live: dict[str, LiveExpert]) -> dict[str, Any]:
    """Samples of /metrics by name, parsed from its text: {name: {labels: value}}."""
    registry = CollectorRegistry()
    registry.register(SwarmCollector(counts, lambda: live))
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def busy() -> Counts:
    """Counts of two texts, one cancelled; one score; and a step."""
    counts = Counts(["a", "b"])
    observer = Observer([counts])
    a_text(observer)
    a_text(observer, error=asyncio.CancelledError())
    with observer.request("score", prompt_bytes=100) as watch:
        watch.admitted()
        watch.finished(Outcome("scored"))
    observer.step(Step("a", 0.05, 0.04, submissions=2, batch=3, tokens=9, rows=3, logits_bytes=1200))
    observer.expert_changed("b", "down", "exited")
    return counts


def test_metrics_say_what_happened() -> None:
    found = exposed(busy(), LIVE)
    a, b = (("expert", "a"),), (("expert", "b"),)
    expected = {
        "requests_received_total": {(): 3},
        "num_requests_running": {(): 0},
        "num_requests_waiting": {(): 0},
        "request_failures_total": {(("code", "CANCELLED"),): 1},
        "prompt_bytes_total": {(): 120},
        "generation_bytes_total": {(): 10},
        "time_to_first_byte_seconds_count": {(): 2},
        "inter_chunk_latency_seconds_count": {(): 2},
        "e2e_request_latency_seconds_count": {(): 2},
        "mixing_seconds_count": {(): 2},
        "expert_step_seconds_sum": {a: 0.05, b: 0},
        "expert_transport_seconds_sum": {a: pytest.approx(0.01), b: 0},
        "expert_batch_size_sum": {a: 3, b: 0},
        "expert_step_tokens_sum": {a: 9, b: 0},
        "expert_transport_bytes_total": {a: 1200, b: 0},
        "prompt_tokens_total": {a: 8, b: 10},
        "generation_tokens_total": {a: 2, b: 1},
        "expert_up": {a: 1, b: 0},
        "expert_lost_total": {a: 0, b: 1},
        "expert_restarts_total": {a: 2, b: 0},
        "expert_queue_depth": {a: 3, b: 0},
        "expert_kv_sequences": {a: 4},
        "expert_kv_sequences_limit": {a: 16, b: 8},
        "kv_cache_usage_perc": {a: 0.25},
        "expert_engine": {(("expert", "a"), ("name", "waiting")): 7},
    }
    assert {name: found[PREFIX + name] for name in expected} == expected
    reasons = found[PREFIX + "request_success_total"]
    assert reasons[(("finished_reason", "max_bytes"),)] == reasons[(("finished_reason", "scored"),)] == 1
    assert reasons[(("finished_reason", "stop_string"),)] == 0


def test_a_scrape_without_experts_still_has_the_counts() -> None:
    found = exposed(busy(), {})
    assert found[PREFIX + "generation_bytes_total"] == {(): 10}
    assert PREFIX + "expert_up" not in found


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "examples/grafana/token-swarm.json").read_text())
    known = exposed(busy(), LIVE)
    asked = {name for text in expressions(dashboard) for name in re.findall(r"\b(?:token_swarm|process)_\w+", text)}
    assert len(asked) > 25
    assert asked - known.keys() == set()
    for text in expressions(dashboard):
        query = re.sub(r"^label_values\((.*), \w+\)$", r"\1", text).replace("$__rate_interval", "1m")
        promql_parser.parse(query)
        assert set(re.findall(r"(\w+)=~", text)) <= {"instance", "expert"}
        if "_bucket" in text:
            assert re.search(r"histogram_quantile\([\d.]+, sum by \(le[ ,)]", text)
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_the_page_lists_every_metric() -> None:
    page = (ROOT / "docs/observability.md").read_text()
    described = set(re.findall(r"`(token_swarm_\w+)`", page))
    names = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in exposed(busy(), LIVE)}
    own = {name for name in names if name.startswith(PREFIX)}
    assert own == described


def test_status_and_rates_say_what_happened() -> None:
    counts = busy()
    before = status_to_proto(Counts(["a", "b"]), LIVE, draining=False)
    now = status_to_proto(counts, LIVE, draining=True)
    before.uptime_seconds, now.uptime_seconds = 10.0, 14.0
    figures = rates(before, now)
    assert figures["draining"]
    assert figures["interval_seconds"] == 4
    assert figures["requests"]["text_bytes_per_second"] == 2.5
    assert figures["requests"]["succeeded_per_second"]["max_bytes"] == 0.25
    assert figures["requests"]["failed_per_second"] == {"CANCELLED": 0.25}
    assert 0 < figures["requests"]["inter_chunk_seconds"]["p99"] <= 0.001
    a, b = figures["experts"]
    assert (a["state"], a["batch"], a["steps_per_second"], a["tokens_per_second"]) == ("ready", 3, 0.25, 2.25)
    assert (a["kv_sequences"], a["kv_tokens"], a["kv_capacity"], a["engine"]) == (4, 50, 200, {"waiting": 7.0})
    assert (b["state"], b["reason"], b["batch"], b["kv_tokens"]) == ("down", "exited with code -9", None, None)
    # A server that was started again counts from nothing.
    before.uptime_seconds = 20.0
    assert rates(before, now)["interval_seconds"] == 14


@pytest.mark.parametrize("idle", [True, False])
def test_top_fits_a_terminal(idle: bool) -> None:
    now = status_to_proto(Counts(["a", "b"]) if idle else busy(), LIVE, draining=False)
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(view(rates(None, now)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    for word in ("ready", "down", "restarts", "tokens/s", "first byte", "4/16", "25.0%", "exited with code -9"):
        assert word in shown


def logged(formatter: logging.Formatter, **call: Any) -> str:
    """The lines that a request writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    log = logging.getLogger("token_swarm_server.requests")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        a_text(Observer([RequestLog()]), **call)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return stream.getvalue()


def test_a_request_ends_in_one_line_of_json() -> None:
    (text,) = logged(JsonFormatter(), given_id="job 7\n").splitlines()
    line = json.loads(text)
    assert (line["request_id"], line["status"], line["reason"]) == ("job7", "OK", "max_bytes")
    assert (line["level"], line["logger"], line["message"]) == ("info", "token_swarm_server.requests", "request")
    assert (line["bytes"], line["prompt_bytes"], line["dropped"], line["reopened"]) == (5, 10, ["b"], 1)
    assert line["experts"]["a"]["share"] == 0.25
    assert line["experts"]["a"]["queue_seconds"] == 0.1
    assert 0 <= line["first_byte_seconds"] <= line["seconds"]
    assert "error" not in line


def test_a_request_ends_in_one_line_of_text() -> None:
    (line,) = logged(TextFormatter(), error=ExpertUnavailable("a", "secret text"), given_id="r1").splitlines()
    assert "INFO requests: request request_id=r1 kind=generate status=UNAVAILABLE error=ExpertUnavailable" in line
    assert "experts.a.weight=0.3" in line
    # The message may quote what a client sent.
    assert "secret" not in line


def test_a_line_cannot_be_forged() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "hello\n2026 INFO forged\x1b[31m", (), None)
    record.fields = {"note": 'a "b" = c\n', "empty": "", "plain": "x-1"}
    text = TextFormatter().format(record)
    assert "\n" not in text
    assert "\x1b" not in text
    assert text.endswith('note="a \\"b\\" = c\\n" empty="" plain=x-1')
    assert "\n" not in JsonFormatter().format(record)


def test_a_console_for_machines_writes_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "token_swarm_server.console")
    console = Console(file=LineLog(), width=1000, color_system=None)
    with Progress(console=console) as progress:
        progress.update(progress.add_task("expert a: ready", total=1), completed=1)
    console.print("serving on 127.0.0.1:50061")
    assert [record.getMessage() for record in caplog.records][-1] == "serving on 127.0.0.1:50061"
    assert caplog.records[0].getMessage().startswith("expert a: ready")


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("oops")
    except ValueError as error:
        record = logging.LogRecord("x.y", logging.ERROR, "f", 1, "bad", (), (ValueError, error, error.__traceback__))
    assert "ValueError: oops" in json.loads(JsonFormatter().format(record))["exception"]
    assert all(line.startswith("  ") for line in TextFormatter().format(record).splitlines()[1:])


def spans(sink_options: dict[str, Any] | None = None, **call: Any) -> Any:
    """What one request exports."""
    exporter = InMemorySpanExporter()
    sink = TraceSink(exporter, **(sink_options or {}))
    a_text(Observer([sink]), **call)
    sink.close()
    return exporter.get_finished_spans()


TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_request_is_a_span_in_the_callers_trace_with_a_child_per_expert() -> None:
    metadata = {"traceparent": f"00-{TRACE}-{PARENT}-01", "authorization": "Bearer secret"}
    found = spans(given_id="job", metadata=metadata)
    (child,) = (span for span in found if span.name == "token_swarm.expert a")
    (parent,) = (span for span in found if span.name == "token_swarm.generate")
    assert f"{parent.context.trace_id:032x}" == TRACE
    assert f"{parent.parent.span_id:016x}" == PARENT
    assert child.parent.span_id == parent.context.span_id
    assert parent.start_time <= child.start_time < child.end_time <= parent.end_time
    given = dict(parent.attributes)
    assert given["token_swarm.request_id"] == "job"
    assert given["rpc.method"] == "token_swarm.v1.SwarmService/Generate"
    assert given["rpc.response.status_code"] == "OK"
    assert given["token_swarm.finish_reason"] == "max_bytes"
    assert (given["token_swarm.unit"], given["token_swarm.rule"]) == ("byte", "linear")
    assert (given["token_swarm.bytes"], given["token_swarm.prompt_bytes"]) == (5, 10)
    assert [event.name for event in parent.events] == ["admitted", "first chunk"]
    assert dict(child.attributes) == {
        "token_swarm.expert": "a",
        "token_swarm.weight": 0.3,
        "token_swarm.queue_seconds": 0.1,
        "token_swarm.compute_seconds": 0.2,
        "token_swarm.transport_seconds": 0.3,
        "token_swarm.calls": 1,
        "token_swarm.tokens_fed": 7,
        "token_swarm.tokens": 2,
        "token_swarm.share": 0.25,
    }
    assert parent.resource.attributes["service.name"] == "token-swarm"
    assert "secret" not in json.dumps([span.to_json() for span in found])


@pytest.mark.parametrize("traceparent", [None, "nonsense", f"00-{TRACE}-{'0' * 16}-01"])
def test_without_a_callers_trace_a_request_begins_one(traceparent: str | None) -> None:
    found = spans(metadata={} if traceparent is None else {"traceparent": traceparent})
    (parent,) = (span for span in found if span.name == "token_swarm.generate")
    assert parent.parent is None


def test_only_the_servers_faults_are_errors() -> None:
    for error, fault in ((ExpertUnavailable("a", "died"), True), (BadParameter("a", 1, "2"), False)):
        (parent,) = (span for span in spans(error=error) if span.name == "token_swarm.generate")
        assert (not parent.status.is_ok and parent.status.description == type(error).__name__) == fault
        assert parent.attributes["error.type"] == type(error).__name__


def test_sampling_is_the_callers_decision_first() -> None:
    assert spans({"sample": 0.0}) == ()
    assert len(spans({"sample": 0.0}, metadata={"traceparent": f"00-{TRACE}-{PARENT}-01"})) == 2
    assert spans({"sample": 1.0}, metadata={"traceparent": f"00-{TRACE}-{PARENT}-00"}) == ()


def test_a_status_has_every_field_of_the_proto() -> None:
    now = status_to_proto(busy(), LIVE, draining=True)
    a = now.experts[0]
    missing = {field.name for field in a.DESCRIPTOR.fields} - {field.name for field, _ in a.ListFields()}
    assert missing == {"reason"}
    assert now.experts[1].state == swarm_pb2.EXPERT_STATE_DOWN
    unset = {f.name for f in now.requests.DESCRIPTOR.fields} - {f.name for f, _ in now.requests.ListFields()}
    assert unset == {"running", "waiting"}
