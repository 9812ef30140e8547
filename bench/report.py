"""Measures everything and writes docs/performance.md's tables: `python -m bench report --help`.

Every program runs in a process of its own and leaves its JSON in bench/results. The tables and plots are made from
those files, so `--tables` makes them again without measuring, and `--only` measures a part anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from token_swarm_server.benchmark.facts import describe
from token_swarm_server.benchmark.plan import ENSEMBLE
from token_swarm_server.benchmark.tables import Table, breakdown_table, latency_table, load_table

from bench import compare, costs
from bench.common import RESULTS
from bench.plots import draw_all

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "figures"
CONFIG = "bench/pair.yaml"
TABLES = ("ratios", "contestants", "latency", "breakdown", "drafts", "load", "costs", "capacity")


def programs(rounds: int) -> dict[str, list[str]]:
    """What each part runs: arguments of the interpreter. All of them print one JSON object."""
    serve = ["--config", CONFIG, "--rounds", str(rounds), "--json"]
    cli = ["-m", "token_swarm_server.cli", "bench"]
    entry = ["-m", "bench"]
    open_loop = ["--rate", "0.2", "--goodput", "ttft:2000,tpot:100"]
    return {
        "compare": [*entry, "compare", "--rounds", str(rounds + 2), "--json"],
        "latency": [*cli, "latency", "--draft-tokens", "0", *serve],
        "drafts": [*cli, "latency", "--no-alone", *serve],
        "load": [*cli, "load", "--concurrency", "1,2,4,8,16", "--max-bytes", "200", *open_loop, *serve],
        "costs": [*entry, "costs", "--rounds", str(rounds), "--json"],
        "kernels": [*entry, "kernels", "--seconds", "0.3", "--json"],
        "byte_walk": [*entry, "byte_walk", "--json"],
        "transport": [*entry, "transport", "--json"],
    }


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one program and keep its JSON. Raises SystemExit when it fails."""
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {name} ended with code {done.returncode}")
    RESULTS.mkdir(exist_ok=True)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def sections(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Table]]:
    """The tables of each report that there is."""
    found: dict[str, list[Table]] = {}
    if (latency := reports.get("latency")) is not None:
        rows = [row for row in latency["rows"] if row["mixture"] == ENSEMBLE]
        parts = [table for row in rows if (table := breakdown_table(row)) is not None]
        found["latency"], found["breakdown"] = [latency_table(latency)], parts
    if (drafts := reports.get("drafts")) is not None:
        found["drafts"] = [latency_table(drafts)]
    if (load := reports.get("load")) is not None:
        found["load"] = [load_table(load)]
    if latency is not None and load is not None and (capacity := capacity_table(latency, load)) is not None:
        found["capacity"] = [capacity]
    if (compared := reports.get("compare")) is not None:
        times, ratios = compare.tables(compared)
        found["ratios"], found["contestants"] = [ratios], [times]
    if (grown := reports.get("costs")) is not None:
        found["costs"] = costs.tables(dict(grown))
    return found


def capacity_table(latency: Mapping[str, Any], load: Mapping[str, Any]) -> Table | None:
    """What a thousand requests a second would take, from the breakdown and the best throughput; None without them."""
    lanes = [row["breakdown"] for row in latency["rows"] if row["mixture"] == ENSEMBLE and row["breakdown"]]
    rows = [row for row in load["rows"] if row["mixture"] == ENSEMBLE and row["concurrency"] is not None]
    if not lanes or not rows:
        return None
    # The shortest prompt: the others add what reading a prompt costs.
    found, best = lanes[0], max(rows, key=lambda row: row["output_bytes_throughput"])
    own = 1000 * sum(found["shared_ms"][part] for part in _COORDINATOR) / found["bytes"]
    travel = 1000 * sum(parts["transport"] for parts in found["experts_ms"].values()) / found["bytes"]
    wanted = _REQUESTS * load["max_bytes"]
    served = best["output_bytes_throughput"]
    columns = ("figure", "coordinator's work", "all transport counted to it")
    table = Table(f"Capacity: {_REQUESTS:,} requests a second of {load['max_bytes']} bytes", columns)
    both = (own, own + travel)
    table.rows += [
        ("microseconds a byte, 1 stream", *(f"{value:,.0f}" for value in both)),
        ("bytes/s of one coordinator core", *(f"{1e6 / value:,.0f}" for value in both)),
        ("coordinator cores", *(f"{wanted * value / 1e6:,.0f}" for value in both)),
        (f"machines like this one, at {served:,.0f} bytes/s ({best['load']})", *[f"{wanted / served:,.0f}"] * 2),
    ]
    return table


_REQUESTS = 1000
_COORDINATOR = ("mix", "prefix_mass", "walk", "scheduling", "send")
_SOURCE = {"breakdown": "latency", "ratios": "compare", "contestants": "compare", "capacity": "load"}


def write_tables(reports: Mapping[str, Mapping[str, Any]], document: Path) -> list[str]:
    """Put each section's tables between its markers, `<!-- table: NAME -->` and `<!-- end -->`.

    Returns the names that were written. Raises SystemExit for a marker that names no section.
    """
    text, found, written = document.read_text(encoding="utf-8"), sections(reports), []

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"error: {document}: table {name!r}: no such table; known: {', '.join(TABLES)}")
        if name not in found:
            return match[0]
        written.append(name)
        facts = textwrap.fill(f"*{describe(reports[_SOURCE.get(name, name)]['facts'])}*", 120, break_on_hyphens=False)
        body = "\n\n".join(table.markdown() for table in found[name])
        return f"<!-- table: {name} -->\n\n{body}\n\n{facts}\n\n<!-- end -->"

    text = re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")
    return written


def main() -> None:
    """Measure what was asked for, then write tables and plots."""
    names = list(programs(1))
    parser = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="what to measure; default: everything")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="measure nothing, use what is in bench/results")
    options = parser.parse_args()
    if not options.tables:
        for name, arguments in programs(options.rounds).items():
            if name in options.only:
                run(name, arguments)
    reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    for path in draw_all(reports, FIGURES):
        print(path.relative_to(ROOT))
    print(f"{DOCUMENT.relative_to(ROOT)}: {', '.join(write_tables(reports, DOCUMENT)) or 'nothing'}")


if __name__ == "__main__":
    main()
