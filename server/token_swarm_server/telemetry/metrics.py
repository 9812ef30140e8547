"""Prometheus metrics: the counts since the start and the experts now, over HTTP. docs/observability.md lists them.

Names and meanings are vLLM's where it has the same thing, with the prefix `token_swarm_` and bytes for tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from itertools import accumulate
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from token_swarm.errors import BadParameter
from token_swarm_server.config.addresses import parse_listen
from token_swarm_server.telemetry.counts import Counts, Histogram
from token_swarm_server.telemetry.status import STATS_SECONDS, LiveExpert

logger = logging.getLogger(__name__)

PREFIX = "token_swarm_"
Look: TypeAlias = Callable[[], Coroutine[Any, Any, Mapping[str, LiveExpert]]]
"""Asks the experts what they hold now."""

_REQUEST_HISTOGRAMS = (
    ("request_queue_time_seconds", "From arrival until a request holds KV on its experts.", "queue"),
    ("request_prefill_time_seconds", "From there until its first chunk of text.", "prefill"),
    ("request_decode_time_seconds", "From its first chunk of text to its last.", "decode"),
    ("request_inference_time_seconds", "From holding KV to the end.", "inference"),
    ("e2e_request_latency_seconds", "From arrival to the end.", "total"),
    ("time_to_first_byte_seconds", "From arrival until the first chunk of text.", "first_byte"),
    ("inter_chunk_latency_seconds", "Between two chunks of a text, each of one byte or more.", "inter_chunk"),
    ("request_time_per_output_byte_seconds", "Per byte after the first chunk; one value a request.", "per_byte"),
    ("request_prompt_bytes", "Length of the prompts, and of texts to score.", "prompt_size"),
    ("request_generation_bytes", "Length of the texts written.", "text_size"),
    ("mixing_seconds", "One stretch of the coordinator's own work on a text, between forwards.", "mixing"),
)
_EXPERT_HISTOGRAMS = (
    ("expert_step_seconds", "From sending a step to its answer.", "seconds"),
    ("expert_compute_seconds", "Of a step, the seconds in the model.", "compute"),
    ("expert_transport_seconds", "Of a step, the seconds outside of the model.", "transport"),
    ("expert_batch_size", "Sequences that were given tokens in one forward.", "batch"),
    ("expert_step_tokens", "Tokens that were given to sequences in one step.", "step_tokens"),
)
_EXPERT_COUNTERS = (
    ("expert_lost", "Times an expert died, hung, or answered nonsense.", "lost"),
    ("expert_submissions", "Calls of requests that steps were made of.", "submissions"),
    ("expert_logit_rows", "Logit rows that came back.", "rows"),
    ("expert_transport_bytes", "Bytes of logits that came back.", "transport_bytes"),
    ("prompt_tokens", "Tokens of the prompts, in each expert's own vocabulary.", "prompt_tokens"),
    ("generation_tokens", "Tokens of the texts written, in each expert's own vocabulary.", "tokens_out"),
    ("spec_decode_num_draft_tokens", "Tokens that were computed ahead of the texts.", "drafted"),
    ("spec_decode_num_accepted_tokens", "Of those, the ones that the texts went on with.", "accepted"),
)
_KV_GAUGES = (
    ("expert_kv_sequences", "Sequences in the KV cache.", "sequences"),
    ("expert_kv_tokens", "Positions of the KV cache in use.", "tokens"),
    ("expert_kv_tokens_limit", "Positions that the KV cache has.", "capacity"),
)


class SwarmCollector(Collector):
    """Turns counts into metrics when it is asked. `look` may be asked from any thread, and wait."""

    def __init__(self, counts: Counts, look: Callable[[], Mapping[str, LiveExpert]]) -> None:
        self._counts = counts
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """Every metric of the server, those of the process apart."""
        yield from self._requests()
        yield from self._work()
        yield from self._experts(self._look())

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would otherwise collect at registration."""
        return iter(())

    def _requests(self) -> Iterator[Metric]:
        requests = self._counts.requests
        yield _gauge("num_requests_running", "Requests that hold KV.", requests.running)
        yield _gauge("num_requests_waiting", "Requests that wait for KV.", requests.waiting)
        yield _counter("requests_received", "Requests that arrived.", requests.received)
        yield _by_label("request_success", "Requests that ended as they should.", "finished_reason", requests.succeeded)
        yield _by_label("request_failures", "Requests that did not, by gRPC status.", "code", requests.failed)
        yield _counter("prompt_bytes", "Bytes of prompts, and of texts to score.", requests.prompt_bytes)
        yield _counter("generation_bytes", "Bytes of text written.", requests.text_bytes)
        yield _counter("request_reopened", "Times a lost expert read a text again.", requests.reopened)
        yield _counter("request_dropped_experts", "Experts that texts went on without.", requests.dropped)
        for name, text, field in _REQUEST_HISTOGRAMS:
            family = HistogramMetricFamily(PREFIX + name, text)
            _add(family, [], getattr(requests, field))
            yield family

    def _work(self) -> Iterator[Metric]:
        experts = self._counts.experts
        for name, text, field in _EXPERT_HISTOGRAMS:
            family = HistogramMetricFamily(PREFIX + name, text, labels=["expert"])
            for expert, counts in experts.items():
                _add(family, [expert], getattr(counts, field))
            yield family
        for name, text, field in _EXPERT_COUNTERS:
            yield _by_label(name, text, "expert", {expert: getattr(of, field) for expert, of in experts.items()})

    def _experts(self, experts: Mapping[str, LiveExpert]) -> Iterator[Metric]:
        def gauge(name: str, text: str, value: Callable[[LiveExpert], float | None]) -> Metric:
            family = GaugeMetricFamily(PREFIX + name, text, labels=["expert"])
            for expert, live in experts.items():
                if (now := value(live)) is not None:
                    family.add_metric([expert], now)
            return family

        yield gauge("expert_up", "1 while an expert takes work.", lambda live: live.state == "ready")
        restarts = {name: live.restarts for name, live in experts.items()}
        yield _by_label("expert_restarts", "Times an expert came back after it was lost.", "expert", restarts)
        yield gauge("expert_queue_depth", "Calls that wait for a step.", lambda live: live.queued)
        yield gauge("expert_kv_sequences_limit", "Sequences that fit.", lambda live: live.max_sequences)
        for name, text, field in _KV_GAUGES:
            yield gauge(name, text, lambda live, field=field: getattr(live.stats, field, None))  # type: ignore[misc]
        yield gauge("kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.", _usage)
        engine = GaugeMetricFamily(
            PREFIX + "expert_engine", "Gauges of a backend's own engine.", labels=["expert", "name"]
        )
        for expert, live in experts.items():
            for name, number in (live.stats.engine if live.stats else {}).items():
                engine.add_metric([expert, name], number)
        yield engine


class MetricsServer:
    """The HTTP endpoint, in threads of its own, from `start` to `stop`."""

    def __init__(self, server: WSGIServer, thread: threading.Thread, host: str) -> None:
        self._server = server
        self._thread = thread
        self.address = f"{host}:{server.server_port}"
        """Where it listens, with the port that was chosen."""

    @classmethod
    def start(cls, listen: str, counts: Counts, look: Look) -> MetricsServer:
        """Serve `http://LISTEN/metrics`. To be called in the event loop that `look` runs in.

        Raises BadParameter if the address is taken.
        """
        loop = asyncio.get_running_loop()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(SwarmCollector(counts, lambda: _ask(look, loop)))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        address = parse_listen(listen)
        try:
            server, thread = start_http_server(address.port, address.host, registry)
        except OSError as error:
            raise BadParameter("coordinator.metrics.listen", listen, "free to listen on") from error
        return cls(server, thread, listen.rpartition(":")[0])

    async def stop(self) -> None:
        """Close the port. Waits for a scrape that runs."""

        def close() -> None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

        await asyncio.to_thread(close)


def _ask(look: Look, loop: asyncio.AbstractEventLoop) -> Mapping[str, LiveExpert]:
    """The experts now, for a thread that is not the loop's; empty when the loop has no time, or ends."""
    try:
        coroutine = look()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError:
            coroutine.close()
            return {}
        return future.result(2 * STATS_SECONDS)
    except Exception:
        logger.warning("a scrape goes without the experts' state", exc_info=True)
        return {}


def _usage(live: LiveExpert) -> float | None:
    return live.stats.tokens / live.stats.capacity if live.stats and live.stats.capacity else None


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _by_label(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=[label])
    # A copy: the loop's thread may add a key.
    for key, value in dict(values).items():
        family.add_metric([key], value)
    return family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    counts = list(accumulate(histogram.counts))
    edges = [*map(floatToGoString, histogram.bounds), "+Inf"]
    family.add_metric(labels, list(zip(edges, counts, strict=True)), histogram.sum)
