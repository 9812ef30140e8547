"""What a text's time is made of, part by part, and how it is told to the client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from token_swarm.v1 import swarm_pb2


@dataclass(slots=True)
class ExpertTime:
    """What one expert did for one request. Seconds: waiting for a step, in the model, and travelling.

    `calls`: answered submissions. `tokens`: that they fed. `wait`: seconds for which it had nothing to do and another
    expert had. `answered_at`: when its latest submission was answered.
    """

    queue: float = 0.0
    compute: float = 0.0
    transport: float = 0.0
    calls: int = 0
    tokens: int = 0
    wait: float = 0.0
    answered_at: float = 0.0


@dataclass(slots=True)
class Parts:
    """What the experts of a text share, in seconds; the names are those of Breakdown in swarm.proto."""

    encode: float = 0.0
    admission: float = 0.0
    mix: float = 0.0
    prefix_mass: float = 0.0
    walk: float = 0.0
    scheduling: float = 0.0
    send: float = 0.0


def breakdown_to_proto(parts: Parts, experts: Mapping[str, ExpertTime]) -> swarm_pb2.Breakdown:
    """Parts and experts as a message."""
    return swarm_pb2.Breakdown(
        experts=[
            swarm_pb2.ExpertTime(
                expert=name,
                steps=own.calls,
                queue_seconds=own.queue,
                compute_seconds=own.compute,
                transport_seconds=own.transport,
                wait_seconds=own.wait,
            )
            for name, own in experts.items()
        ],
        **{f"{part.name}_seconds": getattr(parts, part.name) for part in fields(parts)},
    )
