"""From experts and data to the task of a search: experts loaded, data read, utilities made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from token_swarm.errors import BadParameter
from token_swarm.experts.contract import Expert
from token_swarm.search.data import LeftOutExample
from token_swarm.search.evaluators import ProcessPoolEvaluator, RayEvaluator, Remade, SerialEvaluator
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.experts import LocalExperts, WritingExperts
from token_swarm.search.run.run import Task
from token_swarm.search.run.subset import Subset
from token_swarm.search.score_cache.cache import ROWS_LIMIT, ExpertKey, ScoreCache, fill, filled, model_identity
from token_swarm.search.score_cache.reader import Detail, Passage
from token_swarm.search.score_cache.token_scores import needed_detail
from token_swarm.search.utilities import CachedKind, Generations, Goal, Harmonic, Judging, WrittenKind
from token_swarm.search.utility import Evaluator, Utility


@dataclass(frozen=True)
class Preparation:
    """What is searched, and with which experts.

    goals: several are one harmonic mean. test: share of the examples that is held out, 0: none. progress: told the
    expert, the file, passages read and all of them. say: told in words what takes long, and why. rows_limit: most bytes
    of one expert's logit rows.
    """

    experts: LocalExperts | WritingExperts
    goals: Sequence[Goal]
    space: Space
    judging: Judging = field(default_factory=Judging)
    test: float = 0.5
    progress: Callable[[str, str, int, int], None] = field(default=lambda *_: None, repr=False)
    say: Callable[[str], None] = field(default=lambda _: None, repr=False)
    rows_limit: int = ROWS_LIMIT

    def check(self) -> None:
        """Find what is wrong with the data before an expert is loaded. Raises BadParameter."""
        for goal in self.goals:
            goal.sides(self.test)
            goal.check(self.judging)

    def task(self, *, workers: int = 1) -> Task:
        """Load what is needed, read what was not read yet, and put the halves of the data together.

        With several workers, experts that write text are loaded in each of them instead of here. Raises BadParameter
        for data, experts or options that do not fit one another, ExpertLoadError, and what reading raises.
        """
        passages = [goal.passages for goal in self.goals]
        keys = self._keys(passages)
        generations = None
        if workers == 1 and not all(goal.cached for goal in self.goals):
            generations = self.experts.generations(self.judging.request, keys)
        caches = [
            ScoreCache(self.experts.cache / "scores", list(keys.values()), own)
            if own and isinstance(self.experts, LocalExperts)
            else None
            for own in passages
        ]
        left_out = [_left_out(goal, cache, generations) for goal, cache in zip(self.goals, caches, strict=True)]
        splits = [self._sides(goal, own) for goal, own in zip(self.goals, left_out, strict=True)]
        wholes = [self._utility(goal, cache, keys, generations) for goal, cache in zip(self.goals, caches, strict=True)]
        dev, test = (
            [Subset(whole, halves[side]) for whole, halves in zip(wholes, splits, strict=True) if halves[side]]
            for side in (0, 1)
        )
        return Task(
            space=self.space,
            dev=_joined(dev),
            test=_joined(test) if test else None,
            experts={name: key.fingerprint for name, key in keys.items()},
            fingerprints={name: key.vocabulary for name, key in keys.items()},
            data_hash=self._data_hash(),
            left_out=tuple(example for own in left_out for example in own),
        )

    def _sides(self, goal: Goal, left_out: Sequence[LeftOutExample]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The examples of dev and test that every expert can read. Raises BadParameter where that is not enough."""
        gone = {example.index for example in left_out}
        if 2 * len(gone) > len(goal.dataset):
            first = left_out[0]
            raise BadParameter(
                goal.dataset.name,
                f"{len(gone)} of {len(goal.dataset)} examples cannot be read",
                f"a file of which every expert reads at least half; {first}",
            )
        dev, test = (tuple(i for i in side if i not in gone) for side in goal.sides(self.test))
        for name, side in (("dev", dev), ("test", test)):
            if not side and (name == "dev" or self.test):
                empty = f"empty without the {len(gone)} examples that are left out"
                raise BadParameter(f"{goal.dataset.name}: {name} split", empty, "at least one example")
        return dev, test

    def _keys(self, passages: Sequence[Sequence[Passage]]) -> dict[str, ExpertKey]:
        """Every expert's key; an expert reads all the passages that it has not read before."""
        experts = self.experts
        if not isinstance(experts, LocalExperts):
            if any(passages):
                cached = next(goal.utility for goal in self.goals if goal.cached)
                raise BadParameter("utility", cached, "one that writes text: a server's experts cannot read data")
            return experts.keys()
        loaded: dict[str, Expert] = {}

        def expert(name: str) -> Expert:
            if name not in loaded:
                self.say(f"loading {name}")
                loaded[name] = experts.load(name)
            return loaded[name]

        try:
            keys = {name: self._known_key(experts, name, passages) for name in experts.models}
            found = {
                name: key or ExpertKey.of(expert(name).spec, model_identity(experts.models[name]))
                for name, key in keys.items()
            }
            details = self._details(list(found.values())) if any(passages) else {}
            for name, key in found.items():
                for goal, own in zip(self.goals, passages, strict=True):
                    if own and filled(experts.cache / "scores", own, name, key.source, details[name]) != key:
                        self._read(experts, expert(name), key.source, goal, own, details[name])
            return found
        finally:
            for each in loaded.values():
                each.close()

    def _known_key(self, experts: LocalExperts, name: str, passages: Sequence[Sequence[Passage]]) -> ExpertKey | None:
        """The key of an expert that has read some of this before, so that it may not have to be loaded."""
        source, asked = model_identity(experts.models[name]), experts.dtype(name)
        for own in passages:
            key = filled(experts.cache / "scores", own, name, source) if own else None
            if key is not None and asked in ("auto", key.dtype.removeprefix("torch.")):
                return key
        return None

    def _details(self, keys: Sequence[ExpertKey]) -> Mapping[str, Detail]:
        """How much of what each expert says the space needs."""
        probe = 0.9 * self.space.uniform()  # a single expert's power is searched too
        if self.space.temperatures:
            probe[len(self.space.experts) :] = 0.1
        need = needed_detail(keys, self.space.mixture(probe))
        rows = [name for name, detail in need.details.items() if detail is Detail.ROWS]
        if rows:
            # Token by token: a forward is not needed, but every token of the vocabulary is.
            why = "temperatures reshape tokens" if self.space.temperatures else "they are mixed token by token"
            self.say(
                f"the logit rows of {', '.join(rows)} are kept, as {why}: every particle is mixed from them anew, "
                "exactly but slowly (seconds where bytes take milliseconds; --workers N shares them out); the linear "
                "rule without temperatures needs no rows"
            )
        return need.details

    def _read(
        self,
        experts: LocalExperts,
        expert: Expert,
        source: str,
        goal: Goal,
        passages: Sequence[Passage],
        detail: Detail,
    ) -> None:
        told = partial(self.progress, expert.spec.name, goal.dataset.name)
        tries, root = experts.cache / "tries", experts.cache / "scores"
        limit = self.rows_limit
        fill(root, expert, passages, source=source, detail=detail, tries=tries, progress=told, rows_limit=limit)

    def _utility(
        self,
        goal: Goal,
        cache: ScoreCache | None,
        keys: Mapping[str, ExpertKey],
        generations: Generations | None,
    ) -> Utility:
        kind = goal.kind
        if cache is not None and isinstance(kind, CachedKind):
            return kind.make(goal.dataset.examples, cache, self.judging)
        if generations is not None and isinstance(kind, WrittenKind):
            return kind.make(goal.dataset.examples, generations, self.judging)
        if not isinstance(self.experts, LocalExperts):
            raise BadParameter("workers", "processes", "left out with a server, which writes several texts at a time")
        factory = partial(_in_worker, goal, self.judging, self.experts, keys)
        return Remade(factory, name=goal.utility, smooth=False, items=len(goal.dataset))

    def _data_hash(self) -> str:
        digest = hashlib.sha256(f"{self.test}".encode())
        for goal in self.goals:
            digest.update(f"\n{goal.utility} {goal.dataset.hash}".encode())
        return digest.hexdigest()


def _in_worker(goal: Goal, judging: Judging, experts: LocalExperts, keys: Mapping[str, ExpertKey]) -> Utility:
    """The utility in a process that loads the experts for itself."""
    kind = goal.kind
    if not isinstance(kind, WrittenKind):
        raise TypeError(f"{goal.utility} is judged from a cache, for which no process loads experts")
    return kind.make(goal.dataset.examples, experts.generations(judging.request, keys), judging)


def _left_out(goal: Goal, cache: ScoreCache | None, generations: Generations | None) -> list[LeftOutExample]:
    """The examples of which an expert cannot read a passage, or the prompt of a text that is written."""
    found, spans = [], goal.passages_of()
    for index, example in enumerate(goal.dataset.examples):
        own = None
        if cache is not None:
            own = next((cache.left_out[i] for i in spans[index] if i in cache.left_out), None)
        elif generations is not None:
            own = generations.refuses(example)
        if own is not None:
            found.append(LeftOutExample(goal.dataset.name, index, example.id, *own))
    return found


def _joined(halves: Sequence[Subset]) -> Utility:
    return halves[0] if len(halves) == 1 else Harmonic(halves)


@contextmanager
def evaluating(workers: int = 1, ray: str | None = None) -> Iterator[Evaluator]:
    """Where the utility runs: here, in `workers` processes, or on the Ray cluster at `ray` ("local" starts one).

    Raises BadParameter, ImportError where Ray is missing.
    """
    if ray is not None:
        with RayEvaluator(workers, address=None if ray == "local" else ray) as cluster:
            yield cluster
    elif workers > 1:
        with ProcessPoolEvaluator(workers) as pool:
            yield pool
    else:
        yield SerialEvaluator()
