"""The table of a search: the learned particle beside what it has to beat, on dev and on test examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from token_swarm.particle import Mixture
from token_swarm.search.optimisers.registry import make_optimiser
from token_swarm.search.report.oracles import likelihood_optimum
from token_swarm.search.report.statistics import Comparison, Interval, Resampling, emergence, is_accuracy
from token_swarm.search.run.run import Result, SearchConfig, Task, climb
from token_swarm.search.run.subset import evaluate
from token_swarm.search.utility import Array, Evaluator, Scores, Utility

LEARNED, UNIFORM = "learned", "uniform"


@dataclass(frozen=True)
class Row:
    """One mixture. kind: "learned", "expert", "uniform", "reference" or "oracle".

    against_best: it against the best single expert on the test examples (on dev where there are none), None for that
    expert itself; evaluations and seconds: what finding it took, None where nothing was searched.
    """

    name: str
    kind: str
    mixture: Mixture
    dev: Interval
    test: Interval | None
    against_best: Comparison | None
    evaluations: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Table:
    """rows: the learned particle first. best_expert: the best single one on dev.

    certificate: see `Optimum`, of the oracle on dev in nats per byte. on_test: whether the
    comparisons and `emergence` (see `statistics`; for accuracies) are of the test examples. gained: examples that no
    single expert gets right and the learned particle does, of `nobody` that none gets right. plain: whether the utility
    is a plain mean over the examples, which decides the test (see `Resampling.compare`).
    """

    rows: tuple[Row, ...]
    best_expert: str
    certificate: float | None
    on_test: bool
    emergence: Array | None = None
    gained: int | None = None
    nobody: int | None = None
    plain: bool = True


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str
    mixture: Mixture
    evaluations: int | None = None
    seconds: float | None = None


def make_table(
    task: Task,
    config: SearchConfig,
    result: Result,
    evaluator: Evaluator,
    *,
    references: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Table:
    """Judge the learned particle, every single expert, the uniform mixture, `references` and the oracle.

    references: names of optimisers, each given as many particles and iterations as the search; seed: of the
    resampling. progress is told what is being worked on. Raises what the utility raises.
    """
    space = task.space
    experts = [
        _Entry(name, "expert", space.mixture(row)) for name, row in zip(space.experts, space.one_hot(), strict=True)
    ]
    entries = [
        _Entry(LEARNED, "learned", result.particle.mixture, result.evaluations, result.seconds),
        *experts,
        _Entry(UNIFORM, "uniform", space.mixture(space.uniform())),
    ]
    budget = {key: config.settings[key] for key in ("particles", "iterations") if key in config.settings}
    for name in references:
        progress(name)
        entries += _reference(name, task, budget, config.seed, evaluator)
    progress("oracle")
    started = time.perf_counter()
    found = likelihood_optimum(space, task.dev)
    certificate = None
    if found is not None:
        seconds = time.perf_counter() - started
        name = "EM" if space.on_simplex else "L-BFGS"
        entries.append(_Entry(f"oracle ({name})", "oracle", found[0], found[1].iterations, seconds))
        certificate = found[1].certificate
    progress("dev and test")
    mixtures = [entry.mixture for entry in entries]
    dev = evaluate(evaluator, task.dev, mixtures)
    test = None if task.test is None else evaluate(evaluator, task.test, mixtures)
    best = 1 + int(dev.utility()[1 : 1 + len(experts)].argmax())
    judged = dev if test is None else test
    rows = _rows(entries, dev, test, best, seed)
    more = _emergence(task, result, judged, len(experts), evaluator)
    return Table(rows, entries[best].name, certificate, test is not None, plain=type(judged) is Scores, **more)


def _reference(name: str, task: Task, budget: Mapping[str, Any], seed: int, evaluator: Evaluator) -> list[_Entry]:
    started = time.perf_counter()
    optimiser = make_optimiser(name, task.space, budget, smooth=task.dev.smooth, seed=seed)
    found = climb(optimiser, task.space, task.dev, evaluator)
    if found is None:
        return []
    mixture, _, evaluations = found
    return [_Entry(name, "reference", mixture, evaluations, time.perf_counter() - started)]


def _rows(entries: Sequence[_Entry], dev: Scores, test: Scores | None, best: int, seed: int) -> tuple[Row, ...]:
    on_dev = Resampling(dev, seed=seed)
    on_test = None if test is None else Resampling(test, seed=seed)
    judged = on_test or on_dev
    return tuple(
        Row(
            name=entry.name,
            kind=entry.kind,
            mixture=entry.mixture,
            dev=on_dev.interval(i),
            test=None if on_test is None else on_test.interval(i),
            against_best=None if i == best else judged.compare(i, best),
            evaluations=entry.evaluations,
            seconds=entry.seconds,
        )
        for i, entry in enumerate(entries)
    )


def _emergence(task: Task, result: Result, judged: Scores, experts: int, evaluator: Evaluator) -> dict[str, Any]:
    """For an accuracy: what the single experts got right before, and the particles at the end after."""
    before = Scores(judged.values[1 : 1 + experts], judged.weights)
    if not is_accuracy(Scores(judged.values, judged.weights)):
        return {}
    utility: Utility = task.dev if task.test is None else task.test
    after = evaluate(evaluator, utility, task.space.mixtures(result.population))
    nobody = before.values.max(axis=0) == 0
    return {
        "emergence": emergence(before, after) if is_accuracy(after) else None,
        "gained": int((judged.values[0][nobody] == 1).sum()),
        "nobody": int(nobody.sum()),
    }
