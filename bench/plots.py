"""The pictures of docs/performance.md, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from token_swarm_server.benchmark.plan import ENSEMBLE
from token_swarm_server.benchmark.tables import PART_NAMES, shared_and_own

# The same bytes for the same figures, so that a plot changes only when they do.
matplotlib.rcParams["svg.hashsalt"] = "token-swarm"
matplotlib.rcParams["svg.fonttype"] = "none"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00", "#444444")
_PART_COLOURS = {
    "compute": COLOURS[0],
    "wait": "#C8D3DE",
    "transport": COLOURS[1],
    "queue": COLOURS[4],
    "mix": COLOURS[2],
    "prefix_mass": COLOURS[3],
    "walk": COLOURS[6],
    "scheduling": COLOURS[7],
    "send": COLOURS[5],
    "encode": "#999999",
    "admission": "#DDDDDD",
}


def breakdown_bars(report: Mapping[str, Any], axes: Axes) -> None:
    """One bar an expert and prompt: where the milliseconds of a request went, per byte of text."""
    labels: list[str] = []
    lanes: list[dict[str, float]] = []
    for row in report["rows"]:
        found = row["breakdown"]
        if row["mixture"] != ENSEMBLE or found is None:
            continue
        for expert in found["experts_ms"]:
            labels.append(f"{row['prompt_bytes']:,} bytes\n{expert}")
            lanes.append({part: ms / found["bytes"] for part, ms in shared_and_own(found, expert).items()})
    left = [0.0] * len(lanes)
    for part in (*_PART_COLOURS, *(PART_NAMES.keys() - _PART_COLOURS.keys())):
        widths = [lane[part] for lane in lanes]
        axes.barh(labels, widths, left=left, color=_PART_COLOURS.get(part), label=PART_NAMES[part])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms of the request, per byte of text")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def throughput(report: Mapping[str, Any], axes: Axes) -> None:
    """Output bytes a second against the number of streams, a line a mixture."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in report["rows"]:
        if row["concurrency"] is not None:
            lines.setdefault(row["mixture"], []).append((row["concurrency"], row["output_bytes_throughput"]))
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", color=colour, label=name)
    axes.set_xlabel("streams")
    axes.set_ylabel("bytes a second")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _costs(kind: str, label: str) -> Callable[[Mapping[str, Any], Axes], None]:
    def draw(report: Mapping[str, Any], axes: Axes) -> None:
        rows = report[kind]
        values = [row["ms_per_byte"] for row in rows]
        middle = [value["median"] for value in values]
        error = [[m - v["low"] for m, v in zip(middle, values, strict=True)],
                 [v["high"] - m for m, v in zip(middle, values, strict=True)]]  # fmt: skip
        axes.errorbar([row[kind] for row in rows], middle, yerr=error, marker="o", capsize=3, color=COLOURS[0])
        axes.set_xlabel(label)
        axes.set_ylabel("ms per byte")
        axes.set_ylim(bottom=0)

    return draw


def vocabulary(report: Mapping[str, Any], axes: Axes) -> None:
    """What the coordinator does for a row of logits, by its width."""
    rows = report["vocabulary"]
    widths = [row["vocabulary"] for row in rows]
    ways = {
        "token law": [row["mix_us"] for row in rows],
        "prefix masses": [row["prefix_mass_us"] for row in rows],
        "shared memory": [row["transport_us"]["shared memory"] for row in rows],
        "inline message": [row["transport_us"]["inline"] for row in rows],
    }
    for colour, (name, times) in zip(COLOURS, ways.items(), strict=False):
        axes.plot(widths, times, marker="o", color=colour, label=name)
    axes.set_xlabel("tokens in the vocabulary")
    axes.set_ylabel("microseconds a row")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


PLOTS: dict[str, tuple[str, str, Callable[[Mapping[str, Any], Axes], None]]] = {
    "breakdown": ("latency", "rows", breakdown_bars),
    "throughput": ("load", "rows", throughput),
    "experts": ("costs", "experts", _costs("experts", "experts (two models, each of them once or twice)")),
    "context": ("costs", "context", _costs("context", "bytes of prompt")),
    "vocabulary": ("costs", "vocabulary", vocabulary),
}
"""By file name: the report it is drawn from, the key that report needs, and how."""


def draw_all(reports: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw what there are figures for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (source, key, draw) in PLOTS.items():
        if key not in reports.get(source, {}):
            continue
        figure = Figure(figsize=(9, 3.6) if name == "breakdown" else (5.5, 3.4), layout="constrained")
        draw(reports[source], figure.subplots())
        path = folder / f"{name}.svg"
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        written.append(path)
    return written
