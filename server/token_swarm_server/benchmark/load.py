"""Puts load on a server: closed loop (a number of streams) and open loop (a rate of arrivals).

The words are those of vLLM's serving benchmark. TTFT: time to the first text. TPOT: time per output byte (or token)
after the first text. ITL: time between two pieces of text. E2EL: the whole request. Goodput: requests per second that
met every bound.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from token_swarm.errors import BadParameter
from token_swarm.v1 import swarm_pb2
from token_swarm_server.benchmark.client import Failure, Sample, measure
from token_swarm_server.benchmark.statistics import Spread, Summary

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2_grpc

BOUNDS = ("ttft", "tpot", "e2el")
"""What goodput may bound, in milliseconds; tpot per byte."""


@dataclass(frozen=True)
class Load:
    """How requests arrive: `concurrency` streams, each sending its next when one ends, or `rate` a second (Poisson)."""

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        """Refuse anything but exactly one of the two."""
        if (self.concurrency is None) == (self.rate is None):
            raise BadParameter("load", self, "either a concurrency or a rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise BadParameter("concurrency", self.concurrency, "an integer >= 1")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise BadParameter("rate", self.rate, "a number of requests a second > 0")

    def __str__(self) -> str:
        """`4 streams` or `0.5 requests/s`."""
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return "1 stream" if self.concurrency == 1 else f"{self.concurrency} streams"


@dataclass
class Stretch:
    """One mixture under one load in one round: the requests, and the seconds from the first to the last."""

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def ms_per_byte(self) -> float:
        """Median TPOT of its requests. Raises BadParameter when none of them wrote two pieces of text."""
        times = [1000 * sample.per_byte for sample in self.samples if sample.per_byte is not None]
        summary = Summary.of(times)
        if summary is None:
            longest = max((sample.length for sample in self.samples), default=0)
            raise BadParameter("max_bytes", longest, "more: a time per byte needs texts of two pieces or more")
        return summary.median

    @property
    def bytes_per_second(self) -> float:
        """Output throughput."""
        return self.length / self.seconds

    @property
    def length(self) -> int:
        """Bytes of all texts."""
        return sum(sample.length for sample in self.samples)


async def run_load(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub,
    load: Load,
    requests: Sequence[swarm_pb2.GenerateRequest],
    *,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> Stretch:
    """Send `requests` as `load` says, and wait for all of them. seed: of the arrivals; `done` is called after each."""
    answers: list[Sample | Failure] = []

    async def send(request: swarm_pb2.GenerateRequest) -> None:
        answers.append(await measure(stub, request))
        done()

    started = time.perf_counter()
    if load.rate is None:
        waiting = iter(requests)

        async def stream() -> None:
            for request in waiting:
                await send(request)

        await asyncio.gather(*(stream() for _ in range(load.concurrency or 1)))
    else:
        gaps, due = random.Random(seed), started
        async with asyncio.TaskGroup() as running:
            for request in requests:
                running.create_task(send(request))
                # Against the clock, not from the last arrival: what a sleep is late does not add up.
                due += gaps.expovariate(load.rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
    stretch = Stretch(time.perf_counter() - started)
    for answer in answers:
        if isinstance(answer, Sample):
            stretch.samples.append(answer)
        else:
            stretch.failures.append(answer)
    return stretch


def summarise(stretches: Sequence[Stretch], bounds: Mapping[str, float]) -> dict[str, Any]:
    """Every round of one mixture under one load, as one row for JSON. Latencies in milliseconds."""
    samples = [sample for stretch in stretches for sample in stretch.samples]
    failures = Counter(failure.code for stretch in stretches for failure in stretch.failures)
    seconds = sum(stretch.seconds for stretch in stretches)
    experts = sorted({name for sample in samples for name in sample.tokens})
    row: dict[str, Any] = {
        "requests": len(samples),
        "failed": dict(failures),
        "seconds": seconds,
        "request_throughput": len(samples) / seconds,
        "output_bytes": sum(sample.length for sample in samples),
        "output_bytes_throughput": sum(sample.length for sample in samples) / seconds,
        "output_token_throughput": {
            name: sum(sample.tokens.get(name, 0) for sample in samples) / seconds for name in experts
        },
        "ttft_ms": _summary([sample.first for sample in samples]),
        "tpot_ms": _summary([sample.per_byte for sample in samples]),
        "tpot_ms_per_token": {name: _summary([sample.per_token(name) for sample in samples]) for name in experts},
        "itl_ms": _summary([gap for sample in samples for gap in sample.gaps]),
        "e2el_ms": _summary([sample.total for sample in samples]),
    }
    if bounds:
        good = sum(_meets(sample, bounds) for sample in samples)
        row["goodput"] = good / seconds
        row["goodput_bounds_ms"] = dict(bounds)
    return row


def compare(ensemble: Sequence[Stretch], alone: Mapping[str, Sequence[Stretch]]) -> dict[str, Any]:
    """The ensemble beside each expert alone, round by round: ratios of ms per byte and of bytes a second."""
    slower = [max(values) for values in zip(*([s.ms_per_byte for s in own] for own in alone.values()), strict=True)]
    own = [stretch.ms_per_byte for stretch in ensemble]
    return {
        "ms_per_byte_over_slower_expert": Spread.of_ratio(own, slower).plain(),
        "ms_per_byte_over": {
            name: Spread.of_ratio(own, [s.ms_per_byte for s in single]).plain() for name, single in alone.items()
        },
        "throughput_over": {name: throughput_ratio(ensemble, single).plain() for name, single in alone.items()},
    }


def throughput_ratio(above: Sequence[Stretch], below: Sequence[Stretch]) -> Spread:
    """Bytes a second over bytes a second, round by round."""
    return Spread.of_ratio([s.bytes_per_second for s in above], [s.bytes_per_second for s in below])


def parse_bounds(text: str) -> dict[str, float]:
    """`ttft:2000,tpot:50` as milliseconds by name. Raises BadParameter."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in BOUNDS or not 0 < value < float("inf"):
            raise BadParameter("goodput", part, f"NAME:MILLISECONDS with NAME one of {', '.join(BOUNDS)}")
        bounds[name] = value
    return bounds


def _meets(sample: Sample, bounds: Mapping[str, float]) -> bool:
    got = {"ttft": sample.first, "tpot": sample.per_byte, "e2el": sample.total}
    # A text of a single piece has no time between pieces to miss the bound with.
    return all(1000 * (got[name] or 0.0) <= bound for name, bound in bounds.items())


def _summary(values: Sequence[float | None]) -> dict[str, float] | None:
    summary = Summary.of([value for value in values if value is not None], scale=1000)
    return None if summary is None else asdict(summary)
