"""Totals and distributions since the server started: what /metrics and GetStatus are made of.

The rule: work is counted when it is done, also for requests that are cancelled or fail (bytes, tokens, drafts, steps,
seconds until the first byte and between chunks); what describes a request as a whole (its latency, its phases, its
lengths) is counted for those that ended as they should.

Counting is a few additions to plain numbers: a text is counted with every chunk. prometheus_client's own metrics take a
lock per bucket and 1.3 us per value; here its collector reads these numbers when it is asked (`metrics.py`).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from token_swarm.decoding.request import FinishReason
from token_swarm_server.telemetry.observer import Sink, Step, Watch

REASONS = (*(reason.name.lower() for reason in FinishReason), "scored")
# Edges in seconds, as vLLM has them, so that its dashboards and alerts carry over.
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
FIRST_BYTE_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
# 1, 2, 5 and so on.
REQUEST_BYTES = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
# A byte is a fraction of a token, so three edges come before vLLM's for tokens.
INTER_BYTE_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
STEP_SECONDS = (0.0005, 0.001, 0.0025, *INTER_BYTE_SECONDS[2:-3])
MIXING_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts values by size: `counts[i]` are at most `bounds[i]` and above the bound before; the last has no bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def total(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclass
class RequestCounts:
    """Requests. Seconds as in the histograms of GetStatus."""

    received: int = 0
    succeeded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """By finish reason, `scored` for a score."""
    failed: dict[str, int] = field(default_factory=dict)
    """By name of the gRPC status."""
    running: int = 0
    waiting: int = 0
    prompt_bytes: int = 0
    text_bytes: int = 0
    reopened: int = 0
    dropped: int = 0
    queue: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    first_byte: Histogram = field(default_factory=lambda: Histogram(FIRST_BYTE_SECONDS))
    mixing: Histogram = field(default_factory=lambda: Histogram(MIXING_SECONDS))
    inter_chunk: Histogram = field(default_factory=lambda: Histogram(INTER_BYTE_SECONDS))
    per_byte: Histogram = field(default_factory=lambda: Histogram(INTER_BYTE_SECONDS))
    total: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    inference: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    prefill: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    decode: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    prompt_size: Histogram = field(default_factory=lambda: Histogram(REQUEST_BYTES))
    text_size: Histogram = field(default_factory=lambda: Histogram(REQUEST_BYTES))


@dataclass
class ExpertCounts:
    """One expert's work. `lost`: how often it went away. `tokens_out`: of its vocabulary, in the texts written;
    `drafted`, `accepted`: see `decoding.decoder.ExpertUse`."""

    lost: int = 0
    steps: int = 0
    submissions: int = 0
    rows: int = 0
    tokens: int = 0
    tokens_out: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0
    transport_bytes: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    compute: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    transport: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    batch: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))


class Counts(Sink):
    """Everything that was counted. Written in the event loop's thread; any thread may read."""

    def __init__(self, experts: Sequence[str]) -> None:
        self.started = time.monotonic()
        self.requests = RequestCounts()
        self.experts = {name: ExpertCounts() for name in experts}

    @property
    def uptime(self) -> float:
        """Seconds since the server started."""
        return time.monotonic() - self.started

    def request_started(self, watch: Watch) -> None:
        """Count its prompt."""
        self.requests.received += 1
        self.requests.prompt_bytes += watch.prompt_bytes
        self.requests.waiting += 1

    def request_admitted(self, watch: Watch) -> None:
        """It no longer waits."""
        assert watch.admitted_at is not None
        self.requests.waiting -= 1
        self.requests.running += 1
        self.requests.queue.add(watch.admitted_at - watch.started_at)
        for name, tokens in watch.prompt_tokens.items():
            self.experts[name].prompt_tokens += tokens

    def text(self, watch: Watch, n_bytes: int, gap: float | None) -> None:
        """Count a chunk of text."""
        requests = self.requests
        requests.text_bytes += n_bytes
        if gap is not None:
            requests.inter_chunk.add(gap)
        else:
            assert watch.first_text_at is not None
            requests.first_byte.add(watch.first_text_at - watch.started_at)

    def mixed(self, seconds: float) -> None:
        """Count a round of mixing."""
        self.requests.mixing.add(seconds)

    def request_finished(self, watch: Watch) -> None:
        """Count how it ended, and where its time went."""
        requests = self.requests
        assert watch.ended_at is not None
        if watch.admitted_at is None:
            requests.waiting -= 1
        else:
            requests.running -= 1
        work = watch.work
        requests.reopened += work.reopened
        requests.dropped += len(work.dropped)
        for name, tokens in work.tokens.items():
            self.experts[name].tokens_out += tokens
        for name, drafted in work.drafted.items():
            self.experts[name].drafted += drafted
            self.experts[name].accepted += work.accepted[name]
        if watch.status != "OK" or watch.reason is None:
            requests.failed[watch.status] = requests.failed.get(watch.status, 0) + 1
            return
        requests.succeeded[watch.reason] = requests.succeeded.get(watch.reason, 0) + 1
        requests.total.add(watch.ended_at - watch.started_at)
        requests.prompt_size.add(watch.prompt_bytes)
        if watch.kind == "generate":
            requests.text_size.add(watch.length)
        if watch.admitted_at is not None:
            requests.inference.add(watch.ended_at - watch.admitted_at)
            if watch.first_text_at is not None and watch.last_text_at is not None:
                requests.prefill.add(watch.first_text_at - watch.admitted_at)
                requests.decode.add(watch.last_text_at - watch.first_text_at)
        if (per_byte := watch.seconds_per_byte) is not None:
            requests.per_byte.add(per_byte)

    def step(self, step: Step) -> None:
        """Count a step."""
        counts = self.experts[step.expert]
        counts.steps += 1
        counts.submissions += step.submissions
        counts.rows += step.rows
        counts.tokens += step.tokens
        counts.transport_bytes += step.logits_bytes
        counts.seconds.add(step.seconds)
        counts.compute.add(step.compute)
        counts.transport.add(step.seconds - step.compute)
        counts.batch.add(step.batch)
        counts.step_tokens.add(step.tokens)

    def expert_changed(self, expert: str, state: str, reason: str) -> None:
        """Count how often an expert was lost."""
        del reason
        self.experts[expert].lost += state == "down"
