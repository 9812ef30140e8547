"""The benchmark's tables: one description of each, printed for people or written as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from token_swarm_server.benchmark.latency import EXPERT_PARTS, adds_up
from token_swarm_server.benchmark.plan import ENSEMBLE
from token_swarm_server.benchmark.statistics import Spread

if TYPE_CHECKING:
    from rich.table import Table as RichTable

PART_NAMES = {
    "encode": "encoding the prompt",
    "admission": "waiting for KV",
    "queue": "queue before the expert",
    "compute": "expert forward",
    "transport": "transport there and back",
    "wait": "waiting for the slowest expert",
    "mix": "mixing: logits to token laws",
    "prefix_mass": "prefix masses",
    "walk": "byte walk: choosing bytes",
    "scheduling": "scheduling",
    "send": "handing text to the stream",
}
"""What each part of a request's time is called, in the order in which it is shown."""


@dataclass
class Table:
    """A title, column names and rows of text. The first column is a label, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """As a Markdown table, with its title above and its note below."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|---" + "|---:" * (len(self.columns) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def rich(self, width: int | None = None) -> RichTable:
        """For a terminal of `width` columns (None: any): where the rows do not fit, each becomes a block of lines."""
        wide = self._framed(self.columns, self.rows)
        if width is None or self._width <= width:
            return wide
        blocks: list[Sequence[str]] = []
        for label, *values in self.rows:
            blocks.append((label, ""))
            blocks += (("  " + name, value) for name, value in zip(self.columns[1:], values, strict=True))
        return self._framed((self.columns[0], ""), blocks)

    @property
    def _width(self) -> int:
        """Columns that the widest rows take, two apart."""
        return sum(max(map(len, column)) + 2 for column in zip(self.columns, *self.rows, strict=True)) - 2

    def _framed(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
            # Square brackets are markup to rich.
            title=escape(self.title), caption=escape(self.note) or None, title_justify="left", caption_justify="left",
        )  # fmt: skip
        for number, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        return table


def latency_table(report: Mapping[str, Any]) -> Table:
    """First byte and further bytes of one stream."""
    experts = list(report["experts"])
    table = Table(
        "One warm stream (medians)",
        ("prompt", "mixture", "first byte ms", "ms per byte", *(f"ms per token of {name}" for name in experts)),
    )
    for row in report["rows"]:
        own = row["tpot_ms_per_token"]
        table.rows.append(
            (
                f"{row['prompt_bytes']:,} bytes",
                row["mixture"],
                _median(row["ttft_ms"]),
                _median(row["tpot_ms"]),
                *(_median(own.get(name)) for name in experts),
            )
        )
    table.note = "\n".join(ratio_lines(report["ratios"], "prompt_bytes", " bytes"))
    return table


def breakdown_table(row: Mapping[str, Any]) -> Table | None:
    """What one row's time is made of, one column an expert; None when the server does not say."""
    found = row["breakdown"]
    if found is None:
        return None
    experts = list(found["experts_ms"])
    table = Table(
        f"Where the time goes: {row['prompt_bytes']:,} bytes of prompt, {found['bytes']:g} bytes of text, "
        f"{row['mixture']} (ms of a request)",
        ("part", *experts, "us per byte"),
    )
    total = found["server_total_ms"]
    for part, label in PART_NAMES.items():
        if part in EXPERT_PARTS:
            values = [found["experts_ms"][name][part] for name in experts]
            shown = [f"{value:,.1f} ({value / total:.1%})" for value in values]
            # Experts work at the same time: their times per byte are not one figure.
            table.rows.append((label, *shown, ""))
        else:
            value = found["shared_ms"][part]
            shown = [f"{value:,.1f} ({value / total:.1%})"] * len(experts)
            table.rows.append((label, *shown, f"{1000 * value / max(1, found['bytes']):,.1f}"))
    sums = found["sum_over_total"]
    per_byte = f"{1000 * total / max(1, found['bytes']):,.0f}"
    table.rows.append(("sum of the parts", *(f"{sums[name] * total:,.1f}" for name in experts), ""))
    table.rows.append(("measured by the server", *[f"{total:,.1f}"] * len(experts), per_byte))
    table.rows.append(("sum / measured", *(f"{sums[name]:.1%}" for name in experts), ""))
    grpc = found["grpc_ms"]
    table.rows.append(("gRPC to the client", *[f"{grpc:,.1f}"] * len(experts), f"{1000 * grpc / found['bytes']:,.1f}"))
    table.rows.append(("measured by the client", *[f"{found['client_total_ms']:,.1f}"] * len(experts), ""))
    table.note = "The parts add up within 5%." if adds_up(found) else "THE PARTS DO NOT ADD UP within 5%."
    return table


def load_table(report: Mapping[str, Any]) -> Table:
    """Latency and throughput under each load."""
    table = Table(
        "Under load (mean / median / p99 in ms; TPOT per byte)",
        ("load", "mixture", "requests", "TTFT", "TPOT", "ITL", "E2EL", "requests/s", "bytes/s", "goodput"),
    )
    for row in report["rows"]:
        failed = sum(row["failed"].values())
        table.rows.append(
            (
                row["load"],
                row["mixture"],
                f"{row['requests']}" + (f" ({failed} failed)" if failed else ""),
                *(_three(row[key]) for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")),
                f"{row['request_throughput']:.2f}",
                f"{row['output_bytes_throughput']:,.1f}",
                f"{row['goodput']:.2f}" if "goodput" in row else "-",
            )
        )
    table.note = "\n".join([*ratio_lines(report["ratios"], "load", ""), *_growth_lines(report["rows"])])
    return table


def _growth_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What more streams add to the throughput of each mixture."""
    return [
        f"{row['load']} / {rows[0]['load']}, bytes/s, {row['mixture']}: {Spread(**spread)}."
        for row in rows
        if (spread := row.get("throughput_over_first")) is not None
    ]


def ratio_lines(ratios: Sequence[Mapping[str, Any]], key: str, unit: str) -> list[str]:
    """One line per comparison of the ensemble with the experts alone."""
    lines = []
    for ratio in ratios:
        spread = ratio["ms_per_byte_over_slower_expert"]
        lines.append(
            f"{ratio[key]}{unit}: {ENSEMBLE} / slower expert alone, ms per byte: {Spread(**spread)} "
            f"over {spread['rounds']} rounds."
        )
    return lines


def shared_and_own(found: Mapping[str, Any], expert: str) -> dict[str, float]:
    """One expert's lane of a breakdown in milliseconds, in the order of PART_NAMES."""
    own, shared = found["experts_ms"][expert], found["shared_ms"]
    return {part: own[part] if part in EXPERT_PARTS else shared[part] for part in PART_NAMES}


def _median(summary: Mapping[str, float] | None) -> str:
    return "-" if summary is None else f"{summary['median']:,.1f}"


def _three(summary: Mapping[str, float] | None) -> str:
    return (
        "-"
        if summary is None
        else " / ".join(
            f"{summary[key]:,.0f}" if summary[key] >= 100 else f"{summary[key]:,.1f}"
            for key in ("mean", "median", "p99")
        )
    )
