"""What the benchmark programs share: how they give out their figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from token_swarm_server.benchmark.facts import describe, machine_facts
from token_swarm_server.benchmark.tables import Table

RESULTS = Path(__file__).parent / "results"
"""Where `python -m bench report` keeps what it measured."""
DEMO_EXPERTS = ("smollm2", "gemma3")


def print_json(benchmark: str, figures: Mapping[str, Any]) -> None:
    """One JSON object on standard output: figures with the machine, the versions and the git revision beside them."""
    print(json.dumps({"benchmark": benchmark, "facts": machine_facts(), **figures}))


def print_facts() -> None:
    """The line that stands above a table for people."""
    print(describe(machine_facts()), flush=True)


def give(benchmark: str, figures: Mapping[str, Any], tables: Iterable[Table], *, as_json: bool) -> None:
    """What was measured, on standard output: for machines, or as tables for people."""
    if as_json:
        print_json(benchmark, figures)
        return
    print_facts()
    for table in tables:
        Console().print(table.rich())


def show(spread: Mapping[str, float]) -> str:
    """A `Spread` for a table: `1.07 [1.05, 1.10]`; large numbers with fewer digits."""
    digits = 0 if spread["median"] >= 100 else (1 if spread["median"] >= 10 else 2)
    return f"{spread['median']:,.{digits}f} [{spread['low']:,.{digits}f}, {spread['high']:,.{digits}f}]"
