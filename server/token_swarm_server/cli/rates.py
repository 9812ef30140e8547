"""What two answers of GetStatus say about the time between them: plain figures, for `token-swarm top`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from token_swarm.v1 import swarm_pb2
from token_swarm_server.cli.client import enum_name


def rates(before: swarm_pb2.GetStatusResponse | None, now: swarm_pb2.GetStatusResponse) -> dict[str, Any]:
    """Figures of the time from `before` to `now`; since its start if `before` is None or another server's.

    Seconds, bytes and tokens; what nothing is known of is None. A machine may read it: it is what --json prints.
    """
    if before is None or _started_again(before, now):
        before = swarm_pb2.GetStatusResponse()
    seconds = max(now.uptime_seconds - before.uptime_seconds, 1e-9)
    was = {expert.expert: expert for expert in before.experts}
    return {
        "version": now.version,
        "uptime_seconds": now.uptime_seconds,
        "interval_seconds": seconds,
        "draining": now.draining,
        "requests": _requests(before.requests, now.requests, seconds),
        "experts": [_expert(was.get(e.expert, swarm_pb2.ExpertStatus()), e, seconds) for e in now.experts],
    }


def _started_again(before: swarm_pb2.GetStatusResponse, now: swarm_pb2.GetStatusResponse) -> bool:
    """Whether `now` is of another start of the server: its clock or a count went back."""
    steps = {expert.expert: expert.steps for expert in now.experts}
    return (
        now.uptime_seconds < before.uptime_seconds
        or now.requests.received < before.requests.received
        or any(steps.get(expert.expert, 0) < expert.steps for expert in before.experts)
    )


def _requests(before: swarm_pb2.RequestStatus, now: swarm_pb2.RequestStatus, seconds: float) -> dict[str, Any]:
    return {
        "running": now.running,
        "waiting": now.waiting,
        "received": now.received,
        "succeeded": dict(now.succeeded),
        "failed": dict(now.failed),
        "received_per_second": (now.received - before.received) / seconds,
        "succeeded_per_second": _each(before.succeeded, now.succeeded, seconds),
        "failed_per_second": _each(before.failed, now.failed, seconds),
        "prompt_bytes_per_second": (now.prompt_bytes - before.prompt_bytes) / seconds,
        "text_bytes_per_second": (now.text_bytes - before.text_bytes) / seconds,
        "mixing_share": (now.mixing_seconds - before.mixing_seconds) / seconds,
        "queue_seconds": _quantiles(before.queue_seconds, now.queue_seconds),
        "first_byte_seconds": _quantiles(before.first_byte_seconds, now.first_byte_seconds),
        "inter_chunk_seconds": _quantiles(before.inter_chunk_seconds, now.inter_chunk_seconds),
        "total_seconds": _quantiles(before.total_seconds, now.total_seconds),
    }


def _expert(before: swarm_pb2.ExpertStatus, now: swarm_pb2.ExpertStatus, seconds: float) -> dict[str, Any]:
    steps = now.steps - before.steps

    def per_step(total: float) -> float | None:
        return total / steps if steps else None

    return {
        "expert": now.expert,
        "state": enum_name(swarm_pb2.ExpertState.DESCRIPTOR, now.state),
        "reason": now.reason,
        "restarts": now.restarts,
        "queued": now.queued,
        "batch": per_step(now.batched_sequences - before.batched_sequences),
        "steps_per_second": steps / seconds,
        "tokens_per_second": (now.tokens - before.tokens) / seconds,
        "transport_bytes_per_second": (now.transport_bytes - before.transport_bytes) / seconds,
        "step_seconds": per_step(now.step_seconds - before.step_seconds),
        "compute_seconds": per_step(now.compute_seconds - before.compute_seconds),
        "busy_share": (now.step_seconds - before.step_seconds) / seconds,
        "kv_sequences": now.kv_sequences if now.HasField("kv_sequences") else None,
        "kv_max_sequences": now.kv_max_sequences,
        "kv_tokens": now.kv_tokens if now.HasField("kv_tokens") else None,
        "kv_capacity": now.kv_capacity if now.HasField("kv_capacity") else None,
        "engine": dict(now.engine),
    }


def _each(before: Mapping[str, int], now: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {key: (count - before.get(key, 0)) / seconds for key, count in now.items()}


def _quantiles(before: swarm_pb2.Histogram, now: swarm_pb2.Histogram) -> dict[str, float | None]:
    old = before.counts or [0] * len(now.counts)
    counts = [new - was for new, was in zip(now.counts, old, strict=True)]
    return {f"p{percent}": quantile(now.bounds, counts, percent / 100) for percent in (50, 99)}


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that `share` of all are at most, interpolated within its bucket as Prometheus does.

    None: there are no values. Values beyond the last bound count as the last bound.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below = 0
    for index, count in enumerate(counts[:-1]):
        if below + count >= rank:
            low = bounds[index - 1] if index else 0.0
            return low + (bounds[index] - low) * (rank - below) / count
        below += count
    return bounds[-1]
