"""The report of a run folder: one HTML file that needs nothing else, and its pictures as files beside it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from token_swarm.files import replacing
from token_swarm.particle import Mixture, Rule
from token_swarm.search.report import plots
from token_swarm.search.report.comparison import Row, Table
from token_swarm.search.report.measure import Measure
from token_swarm.search.run.run import CONFIG, HISTORY, Result, Task
from token_swarm.search.run.subset import Subset
from token_swarm.search.utilities import Harmonic, Judge

REPORT, COMPARISON = "report.html", "comparison.json"
_ROUNDING = 1e-15
_TESTS = {True: "a permutation of each example's two values", False: "a bootstrap of the examples"}


def write_report(folder: Path, task: Task, result: Result, table: Table) -> Path:
    """Write `report.html`, its PNG plots and `comparison.json` into the run's folder; returns the report's path.

    Raises BadParameter without matplotlib, OSError when something cannot be written.
    """
    measure = Measure.of(task.dev.name)
    with (folder / HISTORY).open(encoding="utf-8") as file:
        history = plots.History.of([json.loads(line) for line in file])
    pictures = {
        "dynamics.png": plots.dynamics(history, measure, smooth=task.dev.smooth),
        "trajectories.png": plots.trajectories(history, task.space),
        "scores.png": plots.intervals(table, measure),
    }
    if table.emergence is not None:
        pictures["emergence.png"] = plots.emergence(table.emergence)
    for name, png in pictures.items():
        _write(folder / name, png)
    _write(folder / COMPARISON, (json.dumps(comparison_json(table), indent=2) + "\n").encode())
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    page = _page(task, result, table, measure, pictures, config)
    _write(folder / REPORT, page.encode())
    return folder / REPORT


def comparison_json(table: Table) -> dict[str, Any]:
    """The table for machines; utilities as they are, not as they are shown."""
    document = {
        "best_expert": table.best_expert,
        "certificate": table.certificate,
        "compared_on": "test" if table.on_test else "dev",
        "rows": [
            {**asdict(row), "mixture": {**asdict(row.mixture), "rule": row.mixture.rule.value}} for row in table.rows
        ],
        "emergence": None if table.emergence is None else table.emergence.astype(int).tolist(),
        "gained": table.gained,
        "nobody": table.nobody,
    }
    finite: dict[str, Any] = _finite(document)
    return finite


def notes_of(task: Task) -> list[str]:
    """What the utilities have to say of themselves, such as answers of a judge that could not be read."""
    halves = [half for half in (task.dev, task.test) if half is not None]
    utilities = [utility for half in halves for utility in (half.utilities if isinstance(half, Harmonic) else (half,))]
    wholes = [utility.whole if isinstance(utility, Subset) else utility for utility in utilities]
    notes = [own.client.usage.note for own in wholes if isinstance(own, Judge)]
    return list(dict.fromkeys(note for note in notes if note is not None))


def _finite(value: Any) -> Any:
    """JSON has no infinity: null for a score of something impossible, and for a bound that is none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _page(
    task: Task,
    result: Result,
    table: Table,
    measure: Measure,
    pictures: dict[str, bytes],
    config: dict[str, Any],
) -> str:
    sections = [
        f"<h1>{escape(result.particle.name)}</h1>",
        f"<p class='lead'>{escape(_summary(task, result, table, measure))}</p>",
        _picture("scores.png", pictures, "Scores of every mixture on dev and test examples"),
        _score_table(table, measure),
        "<h2>Search</h2>",
        _picture("dynamics.png", pictures, "Utility of each particle and of the best one per iteration"),
        _picture("trajectories.png", pictures, "Weights of the best particle per iteration"),
    ]
    if "emergence.png" in pictures:
        sections += [
            "<h2>Correctness emergence</h2>",
            _picture("emergence.png", pictures, "Examples by how many got them right before and after"),
            f"<p>The learned particle gets {table.gained} of the {table.nobody} examples right that no single expert "
            "gets right.</p>",
        ]
    if task.left_out:
        items = "".join(f"<li>{escape(str(example))}</li>" for example in task.left_out)
        sections += [f"<h2>Left out</h2><ul class='note'>{items}</ul>"]
    sections += ["<h2>Provenance</h2>", _provenance(task, result, config)]
    body = "\n".join(sections)
    title = escape(f"Search report: {result.particle.name}")
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>\n"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _summary(task: Task, result: Result, table: Table, measure: Measure) -> str:
    learned = table.rows[0]
    if result.undecided is not None:
        return (
            f"Nothing was learned: every one of {result.evaluations:,} particles scored "
            f"{measure.text(result.undecided)} ({measure.label}) on the {task.dev.items} dev examples, so that none is "
            "better than another."
        )
    sentences = [
        f"Learned from {task.dev.items} examples with {result.evaluations:,} evaluations in {result.seconds:.1f} s: "
        f"{mixture_text(learned.mixture)}."
    ]
    score = learned.test if table.on_test and learned.test is not None else learned.dev
    where = "test" if table.on_test else "dev"
    label = measure.label[0].upper() + measure.label[1:]
    sentences.append(f"{label} on {where}: {measure.text(score.value)} ({measure.span(score)}).")
    against = learned.against_best
    if against is not None:
        verdict = "better than" if against.difference.value > 0 else "worse than"
        if not against.significant:
            verdict = "not distinguishable from"
        sentences.append(
            f"That is {verdict} the best single expert on dev, {table.best_expert}: "
            f"{measure.text(against.difference.value, signed=True)} "
            f"({measure.span(against.difference, signed=True)}), p = {against.p_value:.2g}."
        )
    if result.failures:
        sentences.append(f"{result.failures} particles failed and counted as the worst.")
    if task.left_out:
        sentences.append(f"{len(task.left_out)} examples were left out, see below.")
    return " ".join([*sentences, *notes_of(task)])


def mixture_text(mixture: Mixture) -> str:
    """The mixture in a line: "log-linear, a 0.412, b 0.771 (temperature 1.2)"."""
    parts = []
    for name, weight in mixture.weights.items():
        temperature = mixture.temperatures.get(name, 1.0)
        heat = f" (temperature {temperature:.3g})" if temperature != 1 else ""
        parts.append(f"{name} {weight:.4g}{heat}")
    return f"{mixture.rule.value}, {', '.join(parts)}"


def _score_table(table: Table, measure: Measure) -> str:
    where = "test" if table.on_test else "dev"
    head = ["", "weights", f"dev {measure.label}", f"test {measure.label}"]
    head += [f"against {table.best_expert} ({where})", "p", "wins : losses", "evaluations", "seconds"]
    lines = [_row(row, measure) for row in table.rows]
    note = (
        "Intervals of scores are 95% percentile bootstraps over examples. p is of a two-sided paired test against the "
        f"best single expert on dev, {_TESTS[table.plain]}; the interval of a difference holds what that test does not "
        f"reject, so it excludes 0 where p is below 0.05. Wins and losses are counted in {where} examples."
    )
    if table.certificate is not None:
        # What is left is never known better than a float64 sum is.
        left = f"{max(table.certificate, _ROUNDING):.1e} nats per byte"
        if table.rows[0].mixture.rule is Rule.LINEAR:
            note += f" On dev no mixture is better than the oracle by more than {left} (EM's certificate)."
        else:
            note += f" On dev the oracle has about {left} left to gain (half its Newton decrement squared)."
        note += " The oracle's evaluations are its iterations."
    rows = "\n".join(lines)
    header = "".join(f"<th>{escape(each)}</th>" for each in head)
    whole = f"<div class='wide'><table class='scores'><tr>{header}</tr>\n{rows}\n</table></div>"
    return f"{whole}<p class='note'>{escape(note)}</p>"


def _row(row: Row, measure: Measure) -> str:
    against = row.against_best
    cells: list[tuple[str, str]] = [
        (row.name, ""),
        (", ".join(f"{weight:.4g}" for weight in row.mixture.weights.values()), ""),
    ]
    cells += [
        ("", "") if interval is None else (measure.text(interval.value), measure.span(interval))
        for interval in (row.dev, row.test)
    ]
    if against is None:
        cells += [("–", "")] * 3
    else:
        difference = against.difference
        cells.append((measure.text(difference.value, signed=True), measure.span(difference, signed=True)))
        cells += [(f"{against.p_value:.2g}", ""), (f"{against.wins} : {against.losses}", "")]
    cells.append(("" if row.evaluations is None else f"{row.evaluations:,}", ""))
    cells.append(("" if row.seconds is None else f"{row.seconds:.2f}", ""))
    text = "".join(
        f"<td>{escape(value)}{f'<small>{escape(span)}</small>' if span else ''}</td>" for value, span in cells
    )
    return f"<tr class='{row.kind}'>{text}</tr>"


def _provenance(task: Task, result: Result, config: dict[str, Any]) -> str:
    facts: list[tuple[str, object]] = [
        ("utility", result.particle.utility),
        (
            "examples",
            f"{task.dev.items} dev, {task.test.items if task.test else 0} test, {len(task.left_out)} left out",
        ),
        ("data hash", task.data_hash),
        ("iterations", result.iterations),
        ("particles judged", f"{result.evaluations:,} ({result.examples:,} examples)"),
        *((f"expert {name}", fingerprint) for name, fingerprint in task.experts.items()),
        *((key, json.dumps(value)) for key, value in config["config"].items()),
    ]
    return _facts(facts)


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    rows = "\n".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in facts)
    return f"<div class='wide'><table class='facts'>{rows}</table></div>"


def _picture(name: str, pictures: dict[str, bytes], text: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return f"<img src='data:image/png;base64,{data}' alt='{escape(text, quote=True)}'>"


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .3rem; } h2 { margin-top: 2rem; }
.lead { font-size: 1.05rem; max-width: 52rem; } .note { color: #5b6673; font-size: .85rem; max-width: 52rem; }
img { max-width: 100%; display: block; margin: .8rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { text-align: right; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid #e6e9ed; }
th:first-child, td:first-child, .facts td { text-align: left; }
.scores td:first-child { white-space: nowrap; }
.facts td { overflow-wrap: anywhere; } .facts th { white-space: nowrap; }
@media print { .wide { overflow: visible; } }
th { color: #5b6673; font-weight: 600; } td small { display: block; color: #5b6673; }
tr.learned td { font-weight: 600; background: #eef5fb; } tr.oracle td { color: #8a3d6e; }
"""
