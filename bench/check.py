"""The regression guard: ratios of this checkout beside those of bench/baseline.json: `python -m bench check --help`.

Only ratios, of things measured in turns in the same run, so that other work on this machine changes little. Compute
differs from memory by other factors in other processors: there is a baseline for each set of vector instructions. All
ratios are better when they are lower. One that is more than 15% above its baseline in the median of the rounds is
measured again in more rounds, and fails if the median of all of them is above it still.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from token_swarm_server.benchmark.facts import machine_facts
from token_swarm_server.benchmark.plan import Plan
from token_swarm_server.benchmark.tables import Table

from bench.common import DEMO_EXPERTS, print_facts, print_json
from bench.compare import Round, draft_turn, round_ratios, swarm_turn
from bench.kernels import interleaved
from bench.recorded_swarm import Swarm
from token_swarm.kernels import STRIDE, dispatch, eager
from token_swarm.particle import Rule

BASELINE = Path(__file__).parent / "baseline.json"
TOLERANCE = 0.15
STREAMS = (1, 8)
_WIDTH = 49_152
_KERNEL_SECONDS = 0.4

Samples = dict[str, list[float]]
"""Each round's own ratio, by name."""


async def measure(options: argparse.Namespace, baseline: Mapping[str, float]) -> Samples:
    """All ratios, more rounds of them while one is above its baseline."""
    samples: Samples = {}
    models = {name: options.models / name for name in DEMO_EXPERTS}
    weights = dict.fromkeys(models, 1 / len(models))
    async with Swarm.start(models, {"rule": "log-linear", "weights": weights}) as swarm:
        await one_round(swarm, options, 0, {})  # warms up
        for number in range(options.rounds):
            await one_round(swarm, options, number + 1, samples)
        if worse(samples, baseline):
            for number in range(options.more_rounds):
                await one_round(swarm, options, options.rounds + number + 1, samples)
    return samples


async def one_round(swarm: Swarm, options: argparse.Namespace, number: int, samples: Samples) -> None:
    """Add one sample of every ratio."""
    found, plan, experts = Round(), Plan(options.prompt_bytes, options.max_bytes, draft_tokens=0), list(swarm.recorders)
    for streams in STREAMS:
        await swarm_turn(swarm, found, plan, experts, streams=streams, texts=max(2, streams), seed=100 * number)
    await draft_turn(swarm, found, plan, texts=2, seed=100 * number)
    for name, ratio in (round_ratios(found, experts, STREAMS) | kernel_ratios()).items():
        samples.setdefault(name, []).append(ratio)


def kernel_ratios() -> dict[str, float]:
    """Our kernels, for a vocabulary that the nearest caches hold: beyond them other work on the machine decides."""
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, _WIDTH, generator=random) * 4 for _ in range(2)]  # [rows, vocab], float32
    weights = torch.full((1, 2), 0.5, dtype=torch.float64)
    mixed = (logits, weights, torch.ones_like(weights), Rule.LOG_LINEAR, torch.ones(_WIDTH, dtype=torch.bool))
    law = torch.softmax(logits[0], 1)
    alone = (logits[0], torch.ones(1, dtype=torch.float64), _WIDTH, _WIDTH)
    calls: dict[str, Callable[[Any], object]] = {
        "mix": lambda kernels: kernels.mix(*mixed),
        # As the byte unit calls it.
        "prefix_mass": lambda kernels: kernels.prefix_mass(law, _WIDTH, STRIDE),
    }
    ratios = {}
    for name, call in calls.items():
        ours, plain = interleaved([partial(call, dispatch), partial(call, eager)], _KERNEL_SECONDS, lambda: None)
        ratios[f"{name} / torch eager"] = ours / plain
    # Not beside torch eager, which takes twice as long whenever the allocator gives its memory back.
    pair = [lambda: dispatch.softmax_masses(*alone), lambda: dispatch.mix(*mixed)]
    masses, mix = interleaved(pair, _KERNEL_SECONDS, lambda: None)
    return ratios | {"softmax_masses / mix": masses / mix}


def worse(samples: Mapping[str, list[float]], baseline: Mapping[str, float]) -> list[str]:
    """Ratios whose median is more than TOLERANCE above the baseline."""
    return [
        name
        for name, known in baseline.items()
        if name in samples and statistics.median(samples[name]) > known * (1 + TOLERANCE)
    ]


def table(samples: Mapping[str, list[float]], baseline: Mapping[str, float]) -> Table:
    """Every ratio beside its baseline."""
    found = Table("Ratios; lower is better", ("ratio", "baseline", "now", "lowest", "highest", "change", ""))
    failed = worse(samples, baseline)
    for name, values in samples.items():
        now, known = statistics.median(values), baseline.get(name)
        change = "-" if known is None else f"{now / known - 1:+.0%}"
        shown = "new" if known is None else ("WORSE" if name in failed else "ok")
        before = "-" if known is None else f"{known:.3f}"
        found.rows.append((name, before, f"{now:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", change, shown))
    return found


def read_baselines(path: Path) -> dict[str, dict[str, float]]:
    """The file's ratios by the processor's vector instructions; empty when there is none yet."""
    if not path.exists():
        return {}
    baselines: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return baselines


def main() -> None:
    """Measure, print, and exit with 1 when a ratio is worse."""
    parser = argparse.ArgumentParser(prog="python -m bench check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path(".cache/experts"), help="folder of the demo experts")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--more-rounds", type=int, default=6, help="when a ratio is worse after the first ones")
    parser.add_argument("--prompt-bytes", type=int, default=64)
    parser.add_argument("--max-bytes", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    baselines, kind = read_baselines(options.baseline), machine_facts()["vector_instructions"]
    baseline = {} if options.update else baselines.get(kind, {})
    if not (baseline or options.update):
        known = f"no baseline for {kind} (there is: {', '.join(baselines) or 'none'})"
        print(f"error: {options.baseline}: {known}; --update makes one", file=sys.stderr)
        raise SystemExit(2)
    samples = asyncio.run(measure(options, baseline))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    if options.update:
        baselines[kind] = {name: round(value, 4) for name, value in medians.items()}
        options.baseline.write_text(json.dumps(baselines, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    failed = worse(samples, baseline)
    if options.json:
        figures: dict[str, Any] = {"ratios": samples, "medians": medians, "baseline": baseline, "worse": failed}
        print_json("check", figures)
    else:
        print_facts()
        Console().print(table(samples, baseline).rich())
    if failed:
        print(f"error: more than {TOLERANCE:.0%} above bench/baseline.json: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
