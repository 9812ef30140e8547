"""What the server does now: live facts about its experts; with the counts since the start, the answer of GetStatus."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from token_swarm.experts.contract import ExpertSpec, ExpertStats
from token_swarm.v1 import swarm_pb2
from token_swarm_server.rpc.errors import TransportError, Unavailable
from token_swarm_server.telemetry.counts import Counts, ExpertCounts, Histogram

STATS_SECONDS = 1.0
"""How long an expert may take to say what it holds; one that computes answers all the same."""


class Link(Protocol):
    """What is asked of an ExpertLink."""

    spec: ExpertSpec
    restarts: int

    @property
    def state(self) -> enum.Enum:
        """ready or down."""
        ...

    @property
    def reason(self) -> str:
        """Why it does not take work."""
        ...

    @property
    def queued(self) -> int:
        """Calls that wait."""
        ...

    async def stats(self) -> ExpertStats:
        """What it holds."""
        ...


@dataclass(frozen=True)
class LiveExpert:
    """An expert now. `state`: ready, starting or down. `stats`: None when it did not answer in time."""

    state: str
    reason: str
    restarts: int
    queued: int
    max_sequences: int
    stats: ExpertStats | None


async def look(links: Mapping[str, Link]) -> dict[str, LiveExpert]:
    """Every expert as it is now; takes at most STATS_SECONDS."""
    held = await asyncio.gather(*map(_stats, links.values()))
    return {
        name: LiveExpert(str(link.state.value), link.reason, link.restarts, link.queued, link.spec.max_sequences, stats)
        for (name, link), stats in zip(links.items(), held, strict=True)
    }


async def _stats(link: Link) -> ExpertStats | None:
    try:
        async with asyncio.timeout(STATS_SECONDS):
            return await link.stats()
    except (TimeoutError, Unavailable, TransportError):
        return None


def status_to_proto(
    counts: Counts, experts: Mapping[str, LiveExpert], *, draining: bool
) -> swarm_pb2.GetStatusResponse:
    """The answer of GetStatus."""
    requests = counts.requests
    return swarm_pb2.GetStatusResponse(
        version=version("token-swarm"),
        uptime_seconds=counts.uptime,
        draining=draining,
        requests=swarm_pb2.RequestStatus(
            running=requests.running,
            waiting=requests.waiting,
            received=requests.received,
            succeeded=requests.succeeded,
            failed=requests.failed,
            prompt_bytes=requests.prompt_bytes,
            text_bytes=requests.text_bytes,
            mixing_seconds=requests.mixing.sum,
            queue_seconds=_histogram(requests.queue),
            first_byte_seconds=_histogram(requests.first_byte),
            inter_chunk_seconds=_histogram(requests.inter_chunk),
            seconds_per_byte=_histogram(requests.per_byte),
            total_seconds=_histogram(requests.total),
        ),
        experts=[_expert(name, live, counts.experts[name]) for name, live in experts.items()],
    )


def _expert(name: str, live: LiveExpert, counts: ExpertCounts) -> swarm_pb2.ExpertStatus:
    stats = live.stats
    return swarm_pb2.ExpertStatus(
        expert=name,
        state=swarm_pb2.ExpertState.Value(f"EXPERT_STATE_{live.state.upper()}"),
        reason=live.reason,
        restarts=live.restarts,
        queued=live.queued,
        steps=counts.steps,
        submissions=counts.submissions,
        batched_sequences=int(counts.batch.sum),
        tokens=counts.tokens,
        rows=counts.rows,
        transport_bytes=counts.transport_bytes,
        step_seconds=counts.seconds.sum,
        compute_seconds=counts.compute.sum,
        kv_sequences=None if stats is None else stats.sequences,
        kv_max_sequences=live.max_sequences,
        kv_tokens=None if stats is None else stats.tokens,
        kv_capacity=None if stats is None else stats.capacity,
        engine={} if stats is None else stats.engine,
    )


def _histogram(histogram: Histogram) -> swarm_pb2.Histogram:
    return swarm_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.sum)
