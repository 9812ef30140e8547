"""What `token-swarm search` shows: live lines while it runs, a table when it is done."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from token_swarm.particle import Mixture
from token_swarm.search.report.comparison import Table as Comparison
from token_swarm.search.report.measure import Measure
from token_swarm.search.report.statistics import Interval
from token_swarm.search.run.run import Progress

_BARS = "▁▂▃▄▅▆▇█"
_CHART = 40
"""Iterations that the chart of the best utility shows."""


class Display:
    """A live view on a terminal; anywhere else a line for every tenth iteration and every finished reading."""

    def __init__(self, console: Console, measure: Measure, iterations: int) -> None:
        self._console, self._measure, self._iterations = console, measure, iterations
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._best: list[float] = []
        self._failed = 0
        self._reason = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def reading(self, expert: str, file: str, done: int, total: int) -> None:
        """An expert has read `done` of `total` passages of a file."""
        text = f"{expert} reads {file}: {done} of {total} passages"
        if self._live is not None:
            self._live.update(Text(f"{text}  {_bar(done / total)}"))
        elif done == total:
            self._console.print(text, highlight=False)

    def working(self, on: str) -> None:
        """Something that takes a while, after the search."""
        if self._live is not None:
            self._live.update(Text(f"comparing: {on}"))

    def iteration(self, now: Progress) -> None:
        """An iteration is over."""
        self._failed += len(now.failures)
        self._reason = next(iter(now.failures.values()), self._reason)
        if now.resumed:
            self._console.print(f"goes on after iteration {now.iteration}", highlight=False)
        if math.isfinite(now.best):
            self._best.append(self._measure.show(now.best))
        if self._live is not None:
            self._live.update(self._panel(now))
        elif now.iteration % 10 == 0 or now.iteration == 1:
            self._console.print(self._line(now), highlight=False, soft_wrap=True)

    def _line(self, now: Progress) -> str:
        best = self._measure.text(now.best) if math.isfinite(now.best) else "none yet"
        failed = f", {self._failed} failed ({self._reason})" if self._failed else ""
        return (
            f"iteration {now.iteration}, {now.evaluations:,} evaluations, {now.seconds:.1f} s, "
            f"best {self._measure.label} {best}{failed}"
        )

    def _panel(self, now: Progress) -> Group:
        lines = [Text(f"{self._line(now)}  {_bar(now.iteration / max(self._iterations, now.iteration))}")]
        if self._best:
            lines.append(Text(_chart(self._best[-_CHART:]), style="blue"))
        if now.mixture is not None:
            lines.append(Text(weights_text(now.mixture)))
        return Group(*lines)


def weights_text(mixture: Mixture, *, named: bool = True) -> str:
    """ "smollm2=0.41 gemma3=0.77", temperatures behind an @; without names "0.41 0.77"."""
    parts = []
    for name, weight in mixture.weights.items():
        temperature = mixture.temperatures.get(name, 1.0)
        parts.append(
            (f"{name}=" if named else "") + f"{weight:.4g}" + (f"@{temperature:.3g}" if temperature != 1 else "")
        )
    return " ".join(parts)


def comparison_table(table: Comparison, measure: Measure) -> Table:
    """The report's table, for a terminal."""
    shown = Table(title=f"{measure.label}, {'higher' if measure.higher_is_better else 'lower'} is better")
    shown.add_column("mixture", overflow="fold")
    names = list(table.rows[0].mixture.weights)
    shown.add_column("\n".join(names), justify="right")
    for name in ("dev", "test", f"against {table.best_expert}", "p"):
        shown.add_column(name, justify="right")
    for row in table.rows:
        against = row.against_best
        shown.add_row(
            row.name,
            "\n".join(weights_text(row.mixture, named=False).split()),
            _with_interval(row.dev, measure),
            "-" if row.test is None else _with_interval(row.test, measure),
            "-" if against is None else measure.text(against.difference.value, signed=True),
            "-" if against is None else f"{against.p_value:.2g}",
            style="bold" if row.kind == "learned" else None,
        )
    test = "paired permutation test" if table.plain else "paired bootstrap"
    shown.caption = f"95% bootstrap intervals; p: {test} against {table.best_expert}"
    return shown


def _with_interval(interval: Interval, measure: Measure) -> str:
    low, high = measure.bounds(interval)
    digits = max(measure.digits - 1, 0)
    return f"{measure.text(interval.value)}\n{low:.{digits}f}–{high:.{digits}f}"


def _bar(share: float, width: int = 24) -> str:
    full = round(width * share)
    return "━" * full + "─" * (width - full)


def _chart(values: list[float]) -> str:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)
