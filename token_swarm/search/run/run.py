"""The search loop: ask, judge, tell, write down; and go on from there after whatever stopped it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.files import replacing
from token_swarm.particle import Mixture, Particle
from token_swarm.search.data import LeftOutExample
from token_swarm.search.optimisers.base import Optimiser
from token_swarm.search.optimisers.registry import OPTIMISERS, make_optimiser
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.checkpoint import Checkpoint, Identity
from token_swarm.search.run.racing import Judged, Race, judge
from token_swarm.search.utility import Array, Evaluator, Utility

CHECKPOINT, HISTORY, CONFIG, PARTICLE = "checkpoint.json", "history.jsonl", "config.json", "particle.json"


class SearchFailed(FailedPrecondition):
    """The search cannot go on: every particle of a batch failed, or what it found cannot be written down."""


@dataclass(frozen=True)
class Task:
    """What a particle is learned for.

    dev is searched, test is looked at once, at the end. experts: name -> fingerprint of all that decides an expert's
    laws, for resuming; fingerprints: name -> vocabulary fingerprint, for the artefact; data_hash: of all examples;
    left_out: those that take no part.
    """

    space: Space
    dev: Utility
    test: Utility | None
    experts: Mapping[str, str]
    fingerprints: Mapping[str, str]
    data_hash: str
    left_out: tuple[LeftOutExample, ...] = ()


@dataclass(frozen=True)
class SearchConfig:
    """How it is searched. settings: see `make_optimiser`; race: see `Race`, None judges everybody on everything.

    keep_undecided: write the particle down even where every particle has the same utility.
    """

    name: str = "learned"
    optimiser: str = OPTIMISERS[0]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    race: tuple[int, ...] | None = None
    keep_undecided: bool = False


@dataclass(frozen=True)
class Progress:
    """The search after an iteration. utilities: [asked], NaN for a particle that failed; failures: why."""

    iteration: int
    evaluations: int
    seconds: float
    utilities: Array
    best: float
    mixture: Mixture | None
    failures: Mapping[int, str]
    resumed: bool = False


@dataclass(frozen=True)
class Result:
    """What was found. population: [n, dimension], the particles at the end; examples: particles x examples judged;
    failures: particles that failed in the whole search; undecided: the score that all particles have in common, where
    none was better than another: then nothing was learned. None where something was.
    """

    particle: Particle
    population: Array
    iterations: int
    evaluations: int
    examples: int
    seconds: float
    failures: int
    undecided: float | None = None


class Search:
    """One search in one folder, which holds its config, history, checkpoint and, at the end, the particle."""

    def __init__(
        self,
        task: Task,
        config: SearchConfig,
        folder: Path,
        evaluator: Evaluator,
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Raises BadParameter for a configuration without sense."""
        if not config.name:
            raise BadParameter("name", config.name, "a non-empty name for the particle")
        if config.race is not None and task.dev.smooth:
            raise BadParameter(
                "race", list(config.race), f"left out: {task.dev.name} is cheap, and exact on all examples"
            )
        self._task, self._config, self._folder = task, config, folder
        self._evaluator, self._progress = evaluator, progress
        self._race = None if config.race is None else Race(config.race, task.dev.items, config.seed)
        self._optimiser = make_optimiser(
            config.optimiser, task.space, config.settings, smooth=task.dev.smooth, seed=config.seed
        )
        self._iteration = self._evaluations = self._examples = self._failures = 0
        self._seconds = 0.0
        self._history_bytes = 0

    @property
    def identity(self) -> Identity:
        """What a checkpoint of this search belongs to."""
        space = self._task.space
        config = {
            # What decides nothing may be another one when a finished search is run again.
            **{key: value for key, value in asdict(self._config).items() if key not in ("name", "keep_undecided")},
            "experts": list(space.experts),
            "rule": space.rule.value,
            "temperatures": space.temperatures,
            "utility": self._task.dev.name,
            "dev_items": self._task.dev.items,
        }
        return Identity(self._task.experts, self._task.data_hash, config)

    def run(self) -> Result:
        """Search to the end, from the folder's checkpoint if it has one; the result is the same either way.

        Raises CheckpointMismatch for a folder of another search, SearchFailed, and what the utility raises; the
        checkpoint of the last whole iteration is kept then.
        """
        self._resume()
        while not self._optimiser.done:
            self._iterate()
        return self._finish()

    def _resume(self) -> None:
        history = self._folder / HISTORY
        try:
            checkpoint = Checkpoint.load(self._folder / CHECKPOINT, self.identity)
            written = history.stat().st_size if history.is_file() else 0
        except OSError as error:
            raise SearchFailed(f"{error.filename} cannot be read: {error.strerror}") from error
        if checkpoint is None:
            self._write(self._folder / CONFIG, json.dumps(asdict(self.identity), indent=2) + "\n")
            history.unlink(missing_ok=True)
            return
        if written < checkpoint.history_bytes:
            raise SearchFailed(f"{history} is shorter than when the checkpoint beside it was made: use another folder")
        self._optimiser.restore(checkpoint.optimiser)
        self._iteration, self._evaluations = checkpoint.iteration, checkpoint.evaluations
        self._examples, self._failures = checkpoint.examples, checkpoint.failures
        self._seconds, self._history_bytes = checkpoint.seconds, checkpoint.history_bytes
        # A line that was written after the checkpoint belongs to an iteration that comes again.
        os.truncate(history, self._history_bytes)
        self._report(np.empty(0), {}, resumed=True)

    def _iterate(self) -> None:
        started = time.perf_counter()
        positions = self._optimiser.ask()
        judged = self._judge(self._task.space.mixtures(positions))
        if np.isnan(judged.utilities).all():
            reasons = sorted(set(judged.failures.values())) or ["the utility was NaN"]
            raise SearchFailed(f"all {len(positions)} particles failed: {'; '.join(reasons[:3])}")
        self._optimiser.tell(positions, judged.utilities)
        self._iteration += 1
        self._evaluations += len(positions)
        self._examples += judged.examples
        self._failures += int(np.isnan(judged.utilities).sum())
        self._seconds += time.perf_counter() - started
        self._write_down(positions, judged)
        self._report(judged.utilities, judged.failures)

    def _judge(self, mixtures: list[Mixture]) -> Judged:
        if self._race is None:
            return judge(self._evaluator, self._task.dev, mixtures)
        return self._race.judge(self._evaluator, self._task.dev, mixtures)

    def _write_down(self, positions: Array, judged: Judged) -> None:
        """One line of history, then the checkpoint that it belongs to."""
        best = self._optimiser.best
        line = {
            "iteration": self._iteration,
            "positions": positions.tolist(),
            # JSON has no NaN: null for a particle that failed, or gave something probability 0.
            "utilities": [value if np.isfinite(value) else None for value in judged.utilities.tolist()],
            "failures": judged.failures,
            "best": None if best is None else best.utility,
            "best_position": None if best is None else best.position.tolist(),
        }
        try:
            with (self._folder / HISTORY).open("ab") as file:
                file.write((json.dumps(line) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
                self._history_bytes = file.tell()
            self._checkpoint().save(self._folder / CHECKPOINT)
        except OSError as error:
            raise SearchFailed(
                f"{error.filename or self._folder}: iteration {self._iteration} cannot be written ({error.strerror}); "
                f"the checkpoint of iteration {self._iteration - 1} is kept: make room and run the same search again"
            ) from error

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            identity=self.identity,
            iteration=self._iteration,
            evaluations=self._evaluations,
            examples=self._examples,
            seconds=self._seconds,
            history_bytes=self._history_bytes,
            optimiser=self._optimiser.state(),
            failures=self._failures,
        )

    def _report(self, utilities: Array, failures: Mapping[int, str], *, resumed: bool = False) -> None:
        if self._progress is None:
            return
        best = self._optimiser.best
        self._progress(
            Progress(
                iteration=self._iteration,
                evaluations=self._evaluations,
                seconds=self._seconds,
                utilities=utilities,
                best=-np.inf if best is None else best.utility,
                mixture=None if best is None else self._task.space.mixture(best.position),
                failures=failures,
                resumed=resumed,
            )
        )

    def _finish(self) -> Result:
        task, best = self._task, self._optimiser.best
        if best is None:
            raise SearchFailed("no particle gives every example a probability above 0")
        mixture = task.space.mixture(best.position)
        undecided = self._undecided()
        test_score = None
        if task.test is not None:
            tested = judge(self._evaluator, task.test, [mixture])
            if np.isnan(tested.utilities[0]):
                reason = tested.failures.get(0, "the utility was NaN")
                raise SearchFailed(f"the learned particle failed on the test examples: {reason}")
            test_score = float(tested.utilities[0])
        particle = Particle(
            name=self._config.name,
            mixture=mixture,
            fingerprints=dict(task.fingerprints),
            utility=task.dev.name,
            data_hash=task.data_hash,
            seed=self._config.seed,
            dev_score=best.utility,
            test_score=test_score,
            undecided=undecided is not None,
        )
        if undecided is None or self._config.keep_undecided:
            self._write(self._folder / PARTICLE, particle.to_json())
        return Result(
            particle=particle,
            population=self._optimiser.population,
            iterations=self._iteration,
            evaluations=self._evaluations,
            examples=self._examples,
            seconds=self._seconds,
            failures=self._failures,
            undecided=undecided,
        )

    def _undecided(self) -> float | None:
        """The utility of all particles of the whole search, if different ones have no other."""
        utilities: set[float | None] = set()
        positions: set[tuple[float, ...]] = set()
        with (self._folder / HISTORY).open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                utilities.update(line["utilities"])
                positions.update(map(tuple, line["positions"]))
                if len(utilities) > 1:
                    return None
        only = utilities.pop()
        return only if len(positions) > 1 else None

    def _write(self, path: Path, text: str) -> None:
        try:
            with replacing(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise SearchFailed(f"{path} cannot be written: {error.strerror}") from error


def climb(
    optimiser: Optimiser, space: Space, utility: Utility, evaluator: Evaluator
) -> tuple[Mixture, float, int] | None:
    """Run an optimiser without a folder: (best mixture, its utility, evaluations), None when nothing was finite.

    For the reference optimisers beside a search.
    """
    evaluations = 0
    while not optimiser.done:
        positions = optimiser.ask()
        optimiser.tell(positions, judge(evaluator, utility, space.mixtures(positions)).utilities)
        evaluations += len(positions)
    best = optimiser.best
    return None if best is None else (space.mixture(best.position), best.utility, evaluations)
