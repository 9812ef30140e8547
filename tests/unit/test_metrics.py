"""What metrics, GetStatus, `token-swarm top` and the dashboard make of what an observer counts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import promql_parser
import pytest
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from token_swarm_server.cli.rates import quantile, rates
from token_swarm_server.cli.top import view
from token_swarm_server.telemetry.counts import INTER_BYTE_SECONDS, Counts, Histogram
from token_swarm_server.telemetry.metrics import PREFIX, SwarmCollector
from token_swarm_server.telemetry.status import LiveExpert, status_to_proto

from tests.unit.observed import LIVE, busy
from token_swarm.v1 import swarm_pb2

ROOT = Path(__file__).parents[2]


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
        "generation_tokens_total": {a: 4, b: 2},
        "spec_decode_num_draft_tokens_total": {a: 10, b: 0},
        "spec_decode_num_accepted_tokens_total": {a: 6, b: 0},
        "request_reopened_total": {(): 2},
        "request_dropped_experts_total": {(): 2},
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


def family(sample: str) -> str:
    """The metric that a sample belongs to."""
    return re.sub(r"_(bucket|count|sum|created)$", "", sample)


def test_the_dashboard_shows_every_metric_of_the_server() -> None:
    dashboard = json.loads((ROOT / "examples/grafana/token-swarm.json").read_text())
    shown = {family(name) for text in expressions(dashboard) for name in re.findall(r"\btoken_swarm_\w+", text)}
    exported = {family(name) for name in exposed(busy(), LIVE) if name.startswith(PREFIX)}
    assert exported - shown == set()


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "examples/grafana/token-swarm.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


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
    names = {family(name) for name in exposed(busy(), LIVE)}
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
    # A server that was started again counts from nothing, also one that has run for longer by now.
    before.uptime_seconds = 20.0
    assert rates(before, now)["interval_seconds"] == 14
    before.uptime_seconds, before.requests.received = 10.0, 1000
    assert rates(before, now)["interval_seconds"] == 14
    before.requests.received = 0
    before.experts[0].steps = 1000
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


def test_a_status_has_every_field_of_the_proto() -> None:
    now = status_to_proto(busy(), LIVE, draining=True)
    a = now.experts[0]
    missing = {field.name for field in a.DESCRIPTOR.fields} - {field.name for field, _ in a.ListFields()}
    assert missing == {"reason"}
    assert now.experts[1].state == swarm_pb2.EXPERT_STATE_DOWN
    unset = {f.name for f in now.requests.DESCRIPTOR.fields} - {f.name for f, _ in now.requests.ListFields()}
    assert unset == {"running", "waiting"}
