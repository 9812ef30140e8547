"""What one request exports as spans."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from token_swarm_server.rpc.errors import ExpertUnavailable
from token_swarm_server.telemetry.observer import Observer
from token_swarm_server.telemetry.tracing import TraceSink

from tests.unit.observed import a_text
from token_swarm.errors import BadParameter


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
