"""One warm stream: how long the first byte and each further byte take, and what that time is made of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from token_swarm.v1 import swarm_pb2
from token_swarm_server.benchmark.client import Sample
from token_swarm_server.benchmark.load import Load, Stretch, compare, run_load, summarise
from token_swarm_server.benchmark.plan import ENSEMBLE, Plan

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2_grpc

SHARED_PARTS = ("encode", "admission", "mix", "prefix_mass", "walk", "scheduling", "send")
"""Parts of a request's time that its experts share."""
EXPERT_PARTS = ("queue", "compute", "transport", "wait")
"""Parts that every expert has of its own. They overlap with those of the other experts."""
TOLERANCE = 0.05
"""How far the parts may add up from the whole."""


async def measure_latency(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub,
    plans: Sequence[Plan],
    experts: Sequence[str],
    *,
    alone: bool,
    rounds: int,
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Every plan, each mixture in turn, `rounds` times after one that warms up. One row per plan and mixture."""
    stretches: dict[tuple[int, str], list[Stretch]] = {}
    for number in range(rounds + 1):
        for index, plan in enumerate(plans):
            for name, fields in plan.mixtures(experts, alone=alone).items():
                # Every round starts at another place of the text, the same one for all mixtures.
                request = plan.request(fields, seed + number)
                stretch = await run_load(stub, Load(concurrency=1), [request], seed=seed, done=done)
                if number:
                    stretches.setdefault((index, name), []).append(stretch)
    rows, ratios = [], []
    for (index, name), own in stretches.items():
        plan, samples = plans[index], [sample for stretch in own for sample in stretch.samples]
        head = {"prompt_bytes": plan.prompt_bytes, "max_bytes": plan.max_bytes, "mixture": name}
        rows.append({**head, **summarise(own, {}), "breakdown": breakdown(samples)})
        if name == ENSEMBLE and alone and all(stretch.samples for mine in stretches.values() for stretch in mine):
            singles = {expert: stretches[index, expert] for expert in experts}
            ratios.append({"prompt_bytes": plan.prompt_bytes, **compare(own, singles)})
    return {"rows": rows, "ratios": ratios}


def breakdown(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Where the time of `samples` went: milliseconds of a request, medians over the samples.

    None when the server gives no breakdown. `sum_over_total`: for each expert, its parts and the shared ones over the
    total that the server measured by itself. `grpc`: what the client waited beyond that total, messages both ways.
    """
    broken = [sample for sample in samples if sample.finish.timings.HasField("breakdown")]
    if not broken:
        return None
    messages = [sample.finish.timings.breakdown for sample in broken]
    # In the order of the server's experts; the breakdown has them in the order of their first answers.
    names = list(broken[0].tokens)
    lanes = {name: [_lane(message, name) for message in messages] for name in names}
    return {
        "shared_ms": {
            part: _median_ms([getattr(message, f"{part}_seconds") for message in messages]) for part in SHARED_PARTS
        },
        "experts_ms": {
            name: {part: _median_ms([lane[part] for lane in own]) for part in EXPERT_PARTS}
            for name, own in lanes.items()
        },
        "steps": {name: statistics.median(lane["steps"] for lane in own) for name, own in lanes.items()},
        "server_total_ms": _median_ms([sample.server for sample in broken]),
        "grpc_ms": _median_ms([sample.total - sample.server for sample in broken]),
        "client_total_ms": _median_ms([sample.total for sample in broken]),
        "bytes": statistics.median(sample.length for sample in broken),
        "sum_over_total": {
            name: statistics.median(
                (_shared(message) + sum(lane[part] for part in EXPERT_PARTS)) / sample.server
                for message, lane, sample in zip(messages, own, broken, strict=True)
            )
            for name, own in lanes.items()
        },
    }


def adds_up(found: Mapping[str, Any]) -> bool:
    """Whether the parts of every expert's lane are within TOLERANCE of the whole."""
    return all(abs(ratio - 1) <= TOLERANCE for ratio in found["sum_over_total"].values())


def _lane(message: swarm_pb2.Breakdown, expert: str) -> dict[str, float]:
    # One that a text went on without before it was asked has no entry.
    own = next((each for each in message.experts if each.expert == expert), swarm_pb2.ExpertTime())
    return {"steps": own.steps, **{part: getattr(own, f"{part}_seconds") for part in EXPERT_PARTS}}


def _shared(message: swarm_pb2.Breakdown) -> float:
    return float(sum(getattr(message, f"{part}_seconds") for part in SHARED_PARTS))


def _median_ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)
