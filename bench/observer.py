"""What watching costs: `python -m bench.observer --help`.

Replays the events that a text of two experts gives (two forwards, two rounds of mixing and one step for every token of
four bytes, a chunk for every byte) through an observer with all its sinks, and without any. The sinks are those of a
server: counts, request log, and traces to an exporter that throws them away.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from token_swarm_server.benchmark.tables import Table
from token_swarm_server.telemetry.counts import Counts
from token_swarm_server.telemetry.logs import JsonFormatter, RequestLog
from token_swarm_server.telemetry.metrics import SwarmCollector
from token_swarm_server.telemetry.observer import Observer, Step, Work
from token_swarm_server.telemetry.tracing import TraceSink

from bench.common import give

BYTES_PER_TOKEN = 4


class _Nowhere(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Throw them away."""
        del spans
        return SpanExportResult.SUCCESS


class _Silent(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Make the line and throw it away."""
        self.format(record)


def write(observer: Observer, length: int) -> None:
    """The events of one text of `length` bytes."""
    with observer.request("generate", prompt_bytes=200) as watch:
        watch.planned("log-linear", "byte", {"a": 0.5, "b": 0.5})
        watch.encoded({"a": 50, "b": 50})
        watch.admitted()
        for at in range(length):
            if at % BYTES_PER_TOKEN == 0:
                for expert in ("a", "b"):
                    observer.step(Step(expert, 0.03, 0.028, 1, 1, 1, 1, 200_000))
                    watch.forward(expert, 0.001, 0.028, 0.001, 1)
                watch.mixed(1e-4)
                watch.mixed(1e-4)
            watch.text(1)
        watch.worked(Work({"a": length // 4, "b": length // 4}, {"a": 0.5, "b": 0.5}))
        watch.finished("max_bytes")


def microseconds(observer: Observer, length: int, texts: int) -> float:
    """Per byte; median over texts."""
    seconds = []
    for _ in range(texts):
        started = time.perf_counter()
        write(observer, length)
        seconds.append((time.perf_counter() - started) / length)
    return statistics.median(seconds) * 1e6


def scrape_milliseconds(counts: Counts, times: int) -> float:
    """For making one page of /metrics, without asking the experts; median."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(SwarmCollector(counts, dict))
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        generate_latest(registry)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0] if __doc__ else None)
    parser.add_argument("--bytes", type=int, default=200, help="length of a text")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--byte-ms", type=float, default=16.4, help="what a byte takes, to compare with")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    log = logging.getLogger("token_swarm_server.requests")
    handler = _Silent()
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    counts = Counts(["a", "b"])
    traces = TraceSink(_Nowhere())
    results = {
        "nobody listens": microseconds(Observer(), options.bytes, options.texts),
        "counts": microseconds(Observer([counts]), options.bytes, options.texts),
        "counts and log": microseconds(Observer([counts, RequestLog()]), options.bytes, options.texts),
        "counts, log and traces": microseconds(Observer([counts, RequestLog(), traces]), options.bytes, options.texts),
    }
    traces.close()
    scrape = scrape_milliseconds(counts, 50)
    table = Table(
        "What being watched costs a text",
        ("who listens", "us per byte", f"% of {options.byte_ms:g} ms"),
        [(name, f"{cost:.2f}", f"{cost / options.byte_ms / 10:.4f}") for name, cost in results.items()],
        f"One page of metrics takes {scrape:.2f} ms.",
    )
    figures = {"microseconds_per_byte": results, "scrape_milliseconds": scrape}
    give("observer", figures, [table], as_json=options.json)


if __name__ == "__main__":
    main()
