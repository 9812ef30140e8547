"""The pictures of a report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from token_swarm.errors import BadParameter
from token_swarm.search.optimisers.space import Space
from token_swarm.search.report.comparison import Table
from token_swarm.search.report.measure import Measure
from token_swarm.search.report.statistics import LEVELS
from token_swarm.search.utility import Array

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00", "#444444")
_ROUNDING = 1e-13  # closer to the best is rounding error
_INK, _FAINT = "#222222", "#9AA5B1"
_KIND_COLOURS = {
    "learned": COLOURS[0],
    "expert": COLOURS[1],
    "uniform": COLOURS[4],
    "reference": COLOURS[2],
    "oracle": COLOURS[3],
}


@dataclass(frozen=True)
class Point:
    """What one particle of one iteration was judged. utility: None where it failed."""

    iteration: int
    position: Array
    utility: float | None


@dataclass(frozen=True)
class History:
    """points: every particle of every iteration; best: of each iteration, [iterations], with its positions."""

    points: tuple[Point, ...]
    best: Array
    best_positions: Array

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> History:
        """From the lines of a run's history file. Raises BadParameter when there are none with a best."""
        points = tuple(
            Point(line["iteration"], np.array(position), utility)
            for line in lines
            for position, utility in zip(line["positions"], line["utilities"], strict=True)
        )
        told = [line for line in lines if line["best"] is not None]
        if not told:
            raise BadParameter("history", f"{len(lines)} iterations", "at least one with a finite utility")
        return cls(
            points, np.array([each["best"] for each in told]), np.array([each["best_position"] for each in told])
        )

    @property
    def iterations(self) -> Array:
        """Numbers of the iterations of `best`."""
        last = self.points[-1].iteration
        return np.arange(last - len(self.best) + 1, last + 1, dtype=np.float64)


def dynamics(history: History, measure: Measure, *, smooth: bool) -> bytes:
    """Utility of every particle and of the global best per iteration.

    Of a smooth utility also how far each is from the final best, on a logarithmic scale.
    """
    figure, (left, *more) = _figure(9.6 if smooth else 7.2, 3.6, 2 if smooth else 1)
    known = [point for point in history.points if point.utility is not None]
    x = np.array([point.iteration for point in known])
    utilities = np.array([point.utility for point in known])
    shown, best = measure.scale * utilities, measure.scale * history.best
    left.scatter(x, shown, s=9, color=_FAINT, alpha=0.6, linewidths=0, label="a particle", zorder=2)
    left.step(history.iterations, best, where="post", color=COLOURS[0], linewidth=2, label="best so far", zorder=3)
    # Single experts may be far below: the picture is of where most particles are.
    ends = np.percentile(shown, [10, 100] if measure.higher_is_better else [0, 90])
    low, high = min(ends[0], best.min()), max(ends[1], best.max())
    margin = 0.06 * (high - low) or 0.5
    left.set_ylim(low - margin, high + margin)
    outside = int(((shown < low - margin) | (shown > high + margin)).sum())
    note = f" ({outside} of {len(shown)} particles outside)" if outside else ""
    left.set(title=f"Search dynamics{note}", xlabel="iteration", ylabel=_axis(measure))
    left.legend(edgecolor="white", loc="lower right" if measure.higher_is_better else "upper right")
    for right in more:
        _behind(right, history, measure, x, utilities)
    return _png(figure)


def _behind(right: Any, history: History, measure: Measure, x: Array, utilities: Array) -> None:
    gaps = abs(measure.scale) * (history.best[-1] - utilities)
    smallest = float(gaps[gaps > 0].min()) if (gaps > 0).any() else 1.0
    right.scatter(x[gaps > 0], gaps[gaps > 0], s=9, color=_FAINT, alpha=0.6, linewidths=0, zorder=2)
    behind = abs(measure.scale) * (history.best[-1] - history.best)
    drawn = np.where(behind > 0, behind, np.nan)
    right.step(history.iterations, drawn, where="post", color=COLOURS[0], linewidth=2, zorder=3)
    right.set_yscale("log")
    right.set_ylim(bottom=max(smallest / 3, _ROUNDING))
    right.set(title="Behind the final best", xlabel="iteration", ylabel=measure.label)


def trajectories(history: History, space: Space) -> bytes:
    """Weight of every expert in the best particle per iteration, with the middle 80% of all particles."""
    count = len(space.experts)
    titles = ["Weights"] + (["Temperatures"] if space.temperatures else [])
    figure, axes = _figure(9.6 if space.temperatures else 7.2, 3.6, len(titles))
    numbers = history.iterations
    for panel, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for index, name in enumerate(space.experts):
            column = panel * count + index
            colour = COLOURS[index % len(COLOURS)]
            style = "-" if index < len(COLOURS) else "--"

            def scaled(values: Array, panel: int = panel) -> Array:
                return values if panel == 0 else np.exp(values)

            each = [scaled(np.array([p.position[column] for p in history.points if p.iteration == i])) for i in numbers]
            low, high = np.array([np.percentile(values, [10, 90]) for values in each]).T
            axis.fill_between(numbers, low, high, color=colour, alpha=0.13, linewidth=0)
            best = scaled(history.best_positions[:, column])
            axis.plot(numbers, best, style, color=colour, linewidth=2, label=f"{name}  {best[-1]:.3f}")
        axis.axhline(panel, color=_FAINT, linewidth=0.8, zorder=1)
        axis.set(title=f"{title} of the best particle", xlabel="iteration", ylabel=title.lower()[:-1])
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="at the end", alignment="left")
    return _png(figure)


def intervals(table: Table, measure: Measure) -> bytes:
    """Dev and test score of every row with its confidence interval."""
    rows = table.rows[::-1]
    figure, (axis,) = _figure(7.2, 0.9 + 0.42 * len(rows), 1)
    for y, row in enumerate(rows):
        for interval, offset, marker in ((row.dev, 0.14, "o"), (row.test, -0.14, "D")):
            if interval is None:
                continue
            colour = _KIND_COLOURS[row.kind]
            low, high = measure.bounds(interval)
            axis.plot([low, high], [y + offset] * 2, color=colour, linewidth=1.6, alpha=0.9)
            face = "white" if marker == "o" else colour
            axis.plot(
                measure.show(interval.value), y + offset, marker, color=colour, markerfacecolor=face, markersize=5.5
            )
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="x", color="#E6E9ED", linewidth=0.8)
    axis.set(title="Scores with 95% bootstrap intervals", xlabel=_axis(measure))
    handles = [axis.plot([], [], "o", color=_INK, markerfacecolor="white", label="dev")[0]]
    if rows[0].test is not None:
        handles.append(axis.plot([], [], "D", color=_INK, label="test")[0])
    axis.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _png(figure)


def emergence(matrix: Array) -> bytes:
    """The correctness-emergence matrix: examples by how many got them right before and after."""
    figure, (axis,) = _figure(5.4, 4.2, 1)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*matrix.shape):
        count, share = matrix[row, column], shares[row, column]
        text = f"{count:.0f}\n{share:.0%}" if matrix[row].sum() else "–"
        axis.text(column, row, text, ha="center", va="center", color="white" if share > 0.55 else _INK, fontsize=9)
    ticks = range(len(LEVELS))
    axis.set_xticks(ticks, LEVELS)
    axis.set_yticks(ticks, [f"{level} ({total:.0f})" for level, total in zip(LEVELS, matrix.sum(axis=1), strict=True)])
    axis.set(title="Correctness emergence", xlabel="particles at the end", ylabel="single experts before")
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return _png(figure)


def _axis(measure: Measure) -> str:
    return f"{measure.label} ({'higher' if measure.higher_is_better else 'lower'} is better)"


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    """(figure, its axes): without pyplot, whose global state would collect figures."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadParameter("report", "plots", "made with matplotlib: pip install 'token-swarm[search]'") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_FAINT)
        axis.tick_params(colors=_INK, labelsize=9)
        axis.title.set_fontsize(10.5)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()
