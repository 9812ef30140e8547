"""OpenTelemetry traces: a span per request with a child per expert. Only loaded where they are switched on.

Spans are made when a request is over, from the times that its watch has: nothing is added to a byte's work, and a
request that the sampler leaves out costs nothing but the question.
"""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from token_swarm_server.telemetry.observer import Sink, Watch

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SERVICE = "token_swarm.v1.SwarmService"
CLOSE_SECONDS = 3.0
"""Given to spans that were not sent yet when the server ends."""
# The server's own faults: for any other status it did what it should.
_FAULTS = {"DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN"}


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to `endpoint` (http://host:port without encryption, https:// with) by OTLP over gRPC."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5)


class TraceSink(Sink):
    """Makes spans and hands them to an exporter in a thread of its own."""

    def __init__(self, exporter: SpanExporter, *, sample: float = 1.0, service_name: str = "token-swarm") -> None:
        """`sample`: share of traces to keep, of those that do not come with the caller's own decision."""
        resource = Resource.create({"service.name": service_name, "service.version": version("token-swarm")})
        self._provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(sample)))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("token_swarm_server")
        self._parents = TraceContextTextMapPropagator()

    def request_finished(self, watch: Watch) -> None:
        """Make its spans."""
        assert watch.ended_at is not None
        # Watches count from an arbitrary moment, spans from 1970.
        offset = time.time_ns() - int(time.perf_counter() * 1e9)

        def moment(seconds: float) -> int:
            return offset + int(seconds * 1e9)

        span = self._tracer.start_span(
            f"token_swarm.{watch.kind}",
            context=self._parents.extract(dict(watch.trace)),
            kind=trace.SpanKind.SERVER,
            start_time=moment(watch.started_at),
            attributes=_request_attributes(watch),
        )
        if span.is_recording():
            if watch.admitted_at is not None:
                span.add_event("admitted", timestamp=moment(watch.admitted_at))
            if watch.first_text_at is not None:
                span.add_event("first chunk", timestamp=moment(watch.first_text_at))
            if watch.status in _FAULTS:
                span.set_status(trace.StatusCode.ERROR, watch.error)
            self._experts(watch, span, moment(watch.admitted_at or watch.started_at), moment(watch.ended_at))
        span.end(moment(watch.ended_at))

    def _experts(self, watch: Watch, parent: trace.Span, start: int, end: int) -> None:
        context = trace.set_span_in_context(parent)
        work = watch.work
        for name, times in watch.experts.items():
            attributes: dict[str, str | int | float] = {
                "token_swarm.expert": name,
                "token_swarm.weight": watch.weights.get(name, 0.0),
                "token_swarm.queue_seconds": times.queue,
                "token_swarm.compute_seconds": times.compute,
                "token_swarm.transport_seconds": times.transport,
                "token_swarm.calls": times.calls,
                "token_swarm.tokens_fed": times.tokens,
            }
            if name in work.tokens:
                attributes["token_swarm.tokens"] = work.tokens[name]
            if name in work.shares:
                attributes["token_swarm.share"] = work.shares[name]
            span = self._tracer.start_span(
                f"token_swarm.expert {name}", context, start_time=start, attributes=attributes
            )
            span.end(end)

    def close(self) -> None:
        """Send what is left, for CLOSE_SECONDS at most."""
        # The exporter keeps trying where nobody answers.
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


def _request_attributes(watch: Watch) -> dict[str, str | int | float]:
    """What is told of a request; never its texts."""
    attributes: dict[str, str | int | float] = {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/{watch.kind.capitalize()}",
        "rpc.response.status_code": watch.status,
        "token_swarm.request_id": watch.id,
        "token_swarm.prompt_bytes": watch.prompt_bytes,
        "token_swarm.bytes": watch.length,
        "token_swarm.chunks": watch.chunks,
        "token_swarm.mixing_seconds": watch.mixing,
    }
    for part in fields(watch.parts):
        attributes[f"token_swarm.{part.name}_seconds"] = getattr(watch.parts, part.name)
    if watch.unit:
        attributes |= {"token_swarm.unit": watch.unit, "token_swarm.rule": watch.rule}
    if watch.error:
        attributes["error.type"] = watch.error
    if watch.reason is not None:
        attributes["token_swarm.finish_reason"] = watch.reason
        attributes["token_swarm.reopened"] = watch.work.reopened
    if watch.work.dropped:
        attributes["token_swarm.dropped"] = ",".join(watch.work.dropped)
    return attributes
