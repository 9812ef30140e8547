"""What `token-swarm search` shows: live lines while it runs, a table when it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from token_swarm.particle import Mixture
from token_swarm.search.data import LeftOutExample
from token_swarm.search.report.comparison import Table as Comparison
from token_swarm.search.report.measure import Measure
from token_swarm.search.report.statistics import Interval
from token_swarm.search.run.run import Progress

_BARS = "▁▂▃▄▅▆▇█"
_CHART = 40
"""Iterations that the chart of the best utility shows."""


_EVERY = 15.0
"""Seconds between lines where there is no terminal to draw on."""
_SHOWN = 10
"""Examples that are left out of which each gets a line."""


class Display:
    """A live view on a terminal; anywhere else a line from time to time, and for every tenth iteration."""

    def __init__(
        self,
        console: Console,
        measure: Measure,
        iterations: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """iterations: the most that there can be."""
        self._console, self._measure, self._iterations, self._clock = console, measure, iterations, clock
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._best: list[float] = []
        self._failed = 0
        self._reason = ""
        self._last: Progress | None = None
        self._searching = True
        self._started = self._told = clock()
        self._reading: tuple[str, str] | None = None
        self._read_before = 0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Something that stays to be read."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def searching(self) -> None:
        """The search begins."""
        self._started = self._clock()

    def reading(self, expert: str, file: str, done: int, total: int) -> None:
        """An expert has read `done` of `total` passages of a file."""
        if self._reading != (expert, file):
            self._reading, self._started, self._read_before = (expert, file), self._clock(), done
        share = (done - self._read_before) / max(total - self._read_before, 1)
        text = f"{expert} reads {file}: {done} of {total} passages{self._left(share)}"
        self._show(Text(f"{text}  {_bar(done / total)}"), text, always=done == total)

    def evaluating(self, done: int, total: int) -> None:
        """Inside of an iteration, `done` of `total` mixture-example pairs are judged."""
        if not self._searching:
            return
        over = 0 if self._last is None else self._last.iteration
        share = (over + done / total) / max(self._iterations, over + 1)
        text = f"iteration {over + 1} of at most {self._iterations}: {done:,} of {total:,} evaluations of an example"
        text += self._left(share, most=True)
        above = [] if self._last is None else [self._panel(self._last)]
        self._show(Group(*above, Text(f"{text}  {_bar(done / total)}")), text)

    def working(self, on: str) -> None:
        """Something that takes a while, after the search."""
        self._searching = False
        self._show(Text(f"comparing: {on}"), f"comparing: {on}")

    def iteration(self, now: Progress) -> None:
        """An iteration is over."""
        self._failed += len(now.failures)
        self._reason = next(iter(now.failures.values()), self._reason)
        if now.resumed:
            self.say(f"goes on after iteration {now.iteration}")
            # What was done before this start says nothing of how long the rest takes.
        if self._last is None:
            self._started = self._clock() - now.seconds
        self._last = now
        if math.isfinite(now.best):
            self._best.append(self._measure.show(now.best))
        share = now.iteration / max(self._iterations, now.iteration)
        line = self._line(now) + self._left(share, most=True)
        self._show(self._panel(now), line, always=now.iteration % 10 == 0 or now.iteration == 1)

    def _show(self, live: RenderableType, line: str, *, always: bool = False) -> None:
        """Draw `live`, or print `line` if the last one was some time ago."""
        now = self._clock()
        if self._live is not None:
            self._live.update(live)
        elif always or now - self._told >= _EVERY:
            self._told = now
            self.say(line)

    def _left(self, share: float, *, most: bool = False) -> str:
        """How long the rest takes when `share` is done, in words; nothing while that is no time at all."""
        seconds = (self._clock() - self._started) * (1 - share) / share if share > 0 else 0.0
        if seconds < 2:
            return ""
        units = ((3600, "h"), (60, "min"), (1, "s"))
        size, unit = next((size, unit) for size, unit in units if seconds >= 2 * size)
        return f", {'at most ' if most else ''}about {seconds / size:.0f} {unit} left"

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


def left_out_lines(examples: Sequence[LeftOutExample]) -> list[str]:
    """A line for each example that takes no part, but for no more than a screen holds."""
    lines = [f"left out: {example}" for example in examples[:_SHOWN]]
    if len(examples) > _SHOWN:
        lines.append(f"left out: {len(examples) - _SHOWN} more; --json and the report name them")
    return lines


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
