"""Several loads on one server, the ensemble and each expert alone in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from token_swarm_server.benchmark.load import Load, Stretch, compare, run_load, summarise, throughput_ratio
from token_swarm_server.benchmark.plan import ENSEMBLE, Plan

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2_grpc

_PER_STREAM = 4
"""The first texts of all streams arrive at the same time, and the last ones run alone: neither should weigh much."""


def request_count(load: Load, requests: int | None) -> int:
    """Requests of one round: what was asked for, else enough for every stream to send four."""
    return requests or _PER_STREAM * (load.concurrency or 1)


def turns(
    plan: Plan, loads: Sequence[Load], experts: Sequence[str], *, alone: bool, requests: int | None, rounds: int
) -> int:
    """Requests that `measure_load` sends in all."""
    mixtures = len(plan.mixtures(experts, alone=alone))
    return mixtures * (1 + rounds * sum(request_count(load, requests) for load in loads))


async def measure_load(
    stub: swarm_pb2_grpc.SwarmServiceAsyncStub,
    plan: Plan,
    loads: Sequence[Load],
    experts: Sequence[str],
    *,
    alone: bool,
    requests: int | None,
    rounds: int,
    seed: int,
    bounds: Mapping[str, float],
    done: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """One row per load and mixture, and one comparison per load. A request of each mixture warms up before.

    The row of a closed loop has `throughput_over_first`: its bytes a second over those of the first load.
    """
    mixtures = plan.mixtures(experts, alone=alone)
    stretches: dict[tuple[int, str], list[Stretch]] = {}
    for fields in mixtures.values():
        await run_load(stub, Load(concurrency=1), [plan.request(fields, seed)], seed=seed, done=done)
    for number in range(rounds):
        for index, load in enumerate(loads):
            count = request_count(load, requests)
            for name, fields in mixtures.items():
                # The same prompts and arrivals for every mixture; others in the next round.
                first = seed + 1 + number * count
                batch = [plan.request(fields, first + offset) for offset in range(count)]
                stretch = await run_load(stub, load, batch, seed=first, done=done)
                stretches.setdefault((index, name), []).append(stretch)
    rows, ratios = [], []
    # A stretch whose requests were all refused has nothing to compare.
    comparable = all(stretch.samples for each in stretches.values() for stretch in each)
    for (index, name), own in stretches.items():
        load = loads[index]
        row = {"load": str(load), "concurrency": load.concurrency, "rate": load.rate, "mixture": name}
        rows.append(row | summarise(own, bounds))
        if comparable and index and loads[0].concurrency is not None and load.concurrency is not None:
            rows[-1]["throughput_over_first"] = throughput_ratio(own, stretches[0, name]).plain()
        if comparable and name == ENSEMBLE and alone:
            singles = {expert: stretches[index, expert] for expert in experts}
            ratios.append({"load": str(load), **compare(own, singles)})
    return {
        "prompt_bytes": plan.prompt_bytes,
        "max_bytes": plan.max_bytes,
        "rounds": rounds,
        "rows": rows,
        "ratios": ratios,
    }
