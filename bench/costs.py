"""What grows with the number of experts, the length of the context and the vocabulary: `python -m bench costs --help`.

experts: one server, 1 to 4 experts of it at work. There are two demo models, so the third and the fourth expert are the
same models once more, in processes of their own: each runs its forwards and counts as an expert. context: prompts of
several lengths before the same number of bytes. vocabulary: what the coordinator does for every token of an expert, by
the width of its logits: the way through shared memory, the token law, the prefix masses.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from token_swarm_server.benchmark.load import Load, Stretch, run_load
from token_swarm_server.benchmark.own_server import own_server
from token_swarm_server.benchmark.plan import Plan
from token_swarm_server.benchmark.statistics import Spread
from token_swarm_server.benchmark.tables import Table
from token_swarm_server.cli.client import connect

from bench import transport
from bench.common import DEMO_EXPERTS, give, show
from bench.kernels import interleaved
from token_swarm.kernels import STRIDE, dispatch
from token_swarm.particle import Rule
from token_swarm.v1 import swarm_pb2

KINDS = ("experts", "context", "vocabulary")
WIDTHS = (32_000, 49_152, 128_256, 152_064, 262_144)
_TRANSPORT_STEPS = 200
_KERNEL_SECONDS = 0.5


def mixture(names: Sequence[str]) -> swarm_pb2.Mixture:
    """A product of experts with equal weights that add up to 1."""
    weights = [swarm_pb2.ExpertWeight(expert=name, weight=1 / len(names)) for name in names]
    return swarm_pb2.Mixture(rule=swarm_pb2.RULE_LOG_LINEAR, weights=weights)


async def serve_and_measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures that need a server, each case in turn in every round; the first round warms up."""
    # As many processes as the largest case needs: the first model twice, then the second.
    several = "experts" in options.what
    models = {name: options.models / name for name in DEMO_EXPERTS}
    if several:
        models |= {f"{name}-again": path for name, path in models.items()}
    names = list(models)
    cases: dict[tuple[str, int], tuple[Plan, list[str]]] = {}
    if several:
        plan = Plan(options.prompt_bytes, options.max_bytes, draft_tokens=0)
        cases |= {("experts", count): (plan, names[:count]) for count in range(1, len(names) + 1)}
    if "context" in options.what:
        for length in options.context:
            cases["context", length] = (Plan(length, options.max_bytes, draft_tokens=0), list(DEMO_EXPERTS))
    found: dict[tuple[str, int], list[Stretch]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="token-swarm-bench-") as folder:
        config = Path(folder) / "swarm.yaml"
        experts = {name: {"model": str(path.absolute()), "threads": 1} for name, path in models.items()}
        config.write_text(yaml.safe_dump({"experts": experts, "cache": f"{folder}/cache"}), encoding="utf-8")
        async with own_server(config) as address, connect(address) as stub:
            for number in range(options.rounds + 1):
                for case, (plan, used) in cases.items():
                    request = plan.request({"mixture": mixture(used)}, number)
                    stretch = await run_load(stub, Load(concurrency=1), [request], seed=0)
                    if number:
                        found[case].append(stretch)
    report: dict[str, Any] = {}
    for (kind, value), stretches in found.items():
        samples = [sample for stretch in stretches for sample in stretch.samples]
        row = {
            kind: value,
            "names": cases[kind, value][1],
            "ms_per_byte": Spread.of([stretch.ms_per_byte for stretch in stretches]).plain(),
            "first_byte_ms": Spread.of([1000 * (sample.first or 0.0) for sample in samples]).plain(),
        }
        report.setdefault(kind, []).append(row)
    return report


async def by_vocabulary() -> list[dict[str, Any]]:
    """Microseconds of the coordinator for one row of logits, one thread."""
    rows = []
    for width in WIDTHS:
        random = torch.Generator().manual_seed(width)
        logits = torch.randn(1, width, generator=random) * 4  # [rows, vocab], float32
        weights, heat = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        allowed = torch.ones(width, dtype=torch.bool)
        law = torch.softmax(logits, 1)
        arguments = ([logits], weights, heat, Rule.LINEAR, allowed)
        mix, prefix = interleaved(
            [
                lambda a=arguments: dispatch.mix(*a),  # type: ignore[misc]
                # As the byte unit calls it.
                lambda law=law, width=width: dispatch.prefix_mass(law, width, STRIDE),  # type: ignore[misc]
            ],
            _KERNEL_SECONDS,
            lambda: None,
        )
        ways = await transport.run(width, 1, _TRANSPORT_STEPS)
        by_name = {way["transport"]: way["median_us"] for way in ways}
        rows.append({"vocabulary": width, "mix_us": mix, "prefix_mass_us": prefix, "transport_us": by_name})
    return rows


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    report: dict[str, Any] = {"max_bytes": options.max_bytes}
    if {"experts", "context"} & set(options.what):
        report |= await serve_and_measure(options)
    if "vocabulary" in options.what:
        report["vocabulary"] = await by_vocabulary()
    return report


def tables(report: dict[str, Any]) -> list[Table]:
    """One table a kind."""
    found = []
    if "experts" in report:
        table = Table("Cost of another expert", ("experts", "which", "ms per byte", "first byte ms"))
        for row in report["experts"]:
            which = ", ".join(row["names"])
            table.rows.append((str(row["experts"]), which, show(row["ms_per_byte"]), show(row["first_byte_ms"])))
        table.note = "`-again` is the same model in another process."
        found.append(table)
    if "context" in report:
        table = Table("Cost of context", ("bytes of prompt", "ms per byte", "first byte ms"))
        for row in report["context"]:
            table.rows.append((f"{row['context']:,}", show(row["ms_per_byte"]), show(row["first_byte_ms"])))
        found.append(table)
    if "vocabulary" in report:
        columns = ("logits", "token law", "prefix masses", "shared memory", "inline message")
        table = Table("Cost of vocabulary: microseconds of a row of float32 logits, one thread", columns)
        for row in report["vocabulary"]:
            ways = row["transport_us"]
            times = (row["mix_us"], row["prefix_mass_us"], ways["shared memory"], ways["inline"])
            table.rows.append((f"{row['vocabulary']:,}", *(f"{time:,.0f}" for time in times)))
        found.append(table)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench costs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--models", type=Path, default=Path(".cache/experts"), help="folder of the demo experts")
    parser.add_argument("--prompt-bytes", type=int, default=128)
    parser.add_argument("--max-bytes", type=int, default=64)
    parser.add_argument("--context", type=int, nargs="+", default=[64, 512, 2048, 4096], help="bytes of prompt")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the first, which warms up")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = asyncio.run(measure(options))
    give("costs", found, tables(found), as_json=options.json)


if __name__ == "__main__":
    main()
