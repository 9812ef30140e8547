"""From a configuration and data files to a task of the search: experts loaded, data read, utilities made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.search import data
from token_swarm.search.evaluators import ProcessPoolEvaluator, RayEvaluator, Remade, SerialEvaluator
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.run import Task
from token_swarm.search.run.subset import Subset
from token_swarm.search.score_cache.cache import ExpertKey, ScoreCache, fill, filled, model_identity
from token_swarm.search.score_cache.reader import Detail, Passage
from token_swarm.search.score_cache.token_scores import needed_detail
from token_swarm.search.utilities import (
    ExactMatch,
    Generations,
    Harmonic,
    Judge,
    JudgeClient,
    JudgeSettings,
    LogLikelihood,
    MultipleChoice,
    Normalise,
    Preference,
    PrefixSharing,
    Regex,
    Reward,
    SequenceClassifier,
    load_function,
    local_generate,
)
from token_swarm.search.utility import Evaluator, Utility
from token_swarm_server.config.cores import available_cores
from token_swarm_server.config.settings import ExpertSettings, Settings
from token_swarm_server.search.remote import RemoteEnsemble


class UtilityName(StrEnum):
    """Values of --utility."""

    LOGLIKELIHOOD = "loglikelihood"
    MULTIPLE_CHOICE = "multiple-choice"
    PREFERENCE = "preference"
    EXACT_MATCH = "exact-match"
    REGEX = "regex"
    REWARD = "reward"
    JUDGE = "judge"


SCHEMAS: dict[UtilityName, type[data.Example]] = {
    UtilityName.LOGLIKELIHOOD: data.TextExample,
    UtilityName.MULTIPLE_CHOICE: data.ChoiceExample,
    UtilityName.PREFERENCE: data.PreferenceExample,
    UtilityName.EXACT_MATCH: data.AnswerExample,
    UtilityName.REGEX: data.PatternExample,
    UtilityName.REWARD: data.PromptExample,
    UtilityName.JUDGE: data.PromptExample,
}
CACHED = (UtilityName.LOGLIKELIHOOD, UtilityName.MULTIPLE_CHOICE, UtilityName.PREFERENCE)
"""Judged from the score cache; the others write text."""


@dataclass(frozen=True)
class Goal:
    """One utility and its examples. Several of them are one harmonic mean."""

    utility: UtilityName
    dataset: data.Dataset[Any]

    @classmethod
    def load(cls, utility: UtilityName, path: Path, limit: int | None) -> Goal:
        """Read the first `limit` examples of a JSONL file; None: all. Raises DataError, BadParameter, OSError."""
        return cls(utility, data.load_jsonl(path, SCHEMAS[utility]).head(limit))


@dataclass(frozen=True)
class Judging:
    """How examples are judged: what only some of the utilities look at."""

    normalise: Normalise = Normalise.SUM
    extract: str | None = None
    numeric: bool = False
    reward: str | None = None
    judge: JudgeSettings | None = None
    request: DecodeRequest = field(default_factory=DecodeRequest)


@dataclass(frozen=True)
class LocalExperts:
    """The experts of a configuration, loaded in this process. models: what each of them loads. Can be pickled."""

    models: Mapping[str, str]
    settings: Mapping[str, ExpertSettings]
    cache: Path

    @classmethod
    def of(cls, settings: Settings, models: Mapping[str, str]) -> LocalExperts:
        """Raises BadParameter for an expert that runs elsewhere."""
        for name, each in settings.experts.items():
            if name not in models or each.model is None:
                raise BadParameter(
                    f"experts.{name}.address", each.address, "left out: the search loads its experts itself"
                )
        return cls(dict(models), dict(settings.experts), settings.cache.absolute())

    def load(self, name: str, *, share: int = 1) -> TransformersExpert:
        """One expert; `share`: how many use this machine's cores together. Raises ExpertLoadError."""
        given = self.settings[name]
        return TransformersExpert(
            name,
            self.models[name],
            device=given.device,
            dtype=given.dtype,
            threads=given.threads or max(1, len(available_cores()) // share),
            max_sequences=given.max_sequences,
            max_context=given.max_context,
        )

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together. Raises ExpertLoadError."""
        experts = {name: PrefixSharing(self.load(name, share=len(self.models))) for name in self.models}
        local = LocalEnsemble(experts, self.cache / "tries")
        marks = {name: key.fingerprint for name, key in keys.items()}
        return Generations(local_generate(local), request, marks, self.cache / "generations")


@dataclass(frozen=True)
class RemoteExperts:
    """The experts of a running server, which writes `concurrency` texts at a time. cache: folder of texts."""

    server: RemoteEnsemble
    cache: Path
    concurrency: int = 1

    def generations(self, request: DecodeRequest, keys: Mapping[str, ExpertKey]) -> Generations:
        """All of them, writing texts together."""
        marks = {name: key.fingerprint for name, key in keys.items()}
        return Generations(self.server.generate, request, marks, self.cache / "generations", self.concurrency)


@dataclass(frozen=True)
class Preparation:
    """What is searched, and with which experts. progress: told the expert, the file, passages read and all of them."""

    experts: LocalExperts | RemoteExperts
    goals: tuple[Goal, ...]
    judging: Judging
    space: Space
    test: float
    progress: Callable[[str, str, int, int], None] = field(default=lambda *_: None, repr=False)

    def task(self, *, workers: int = 1) -> Task:
        """Load what is needed, read what was not read yet, and put the halves of the data together.

        With several workers, experts that write text are loaded in each of them instead of here. Raises BadParameter
        for data, experts or options that do not fit one another, ExpertLoadError, and what reading raises.
        """
        everything = [(tuple(range(len(goal.dataset))), ()) for goal in self.goals]
        splits = [goal.dataset.split(self.test) for goal in self.goals] if self.test else everything
        passages = [_passages(goal) for goal in self.goals]
        keys = self._keys(passages)
        generations = None
        if workers == 1 and any(goal.utility not in CACHED for goal in self.goals):
            generations = self.experts.generations(self.judging.request, keys)
        wholes = [self._utility(*each, keys, generations) for each in zip(self.goals, passages, strict=True)]
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
        )

    def _keys(self, passages: Sequence[Sequence[Passage]]) -> dict[str, ExpertKey]:
        """Every expert's key; an expert reads all the passages that it has not read before."""
        experts = self.experts
        if isinstance(experts, RemoteExperts):
            if any(passages):
                cached = next(goal.utility.value for goal in self.goals if goal.utility in CACHED)
                raise BadParameter("utility", cached, "one that writes text: a server's experts cannot read data")
            return experts.server.keys()
        loaded: dict[str, TransformersExpert] = {}

        def expert(name: str) -> TransformersExpert:
            if name not in loaded:
                loaded[name] = experts.load(name)
            return loaded[name]

        try:
            keys = {name: self._known_key(experts, name, passages) for name in experts.models}
            found = {
                name: key or ExpertKey.of(expert(name).spec, model_identity(experts.models[name]))
                for name, key in keys.items()
            }
            detail = self._detail(list(found.values())) if any(passages) else Detail.BYTES
            for name, key in found.items():
                for goal, own in zip(self.goals, passages, strict=True):
                    if own and filled(experts.cache / "scores", own, name, key.source, detail) != key:
                        self._read(experts, expert(name), key.source, goal, own, detail)
            return found
        finally:
            for each in loaded.values():
                each.close()

    def _known_key(self, experts: LocalExperts, name: str, passages: Sequence[Sequence[Passage]]) -> ExpertKey | None:
        """The key of an expert that has read some of this before, so that it may not have to be loaded."""
        source, asked = model_identity(experts.models[name]), experts.settings[name].dtype
        for own in passages:
            key = filled(experts.cache / "scores", own, name, source) if own else None
            if key is not None and asked in ("auto", key.dtype.removeprefix("torch.")):
                return key
        return None

    def _detail(self, keys: Sequence[ExpertKey]) -> Detail:
        """How much of what the experts say the space needs. Raises BadParameter when nothing cached would do."""
        probe = 0.9 * self.space.uniform()  # a single expert's power is searched too
        if self.space.temperatures:
            probe[len(self.space.experts) :] = 0.1
        detail, field_name, value, why = needed_detail(keys, self.space.mixture(probe))
        if detail is None:
            raise BadParameter(field_name, value, f"{why}; across vocabularies only bytes are cached")
        return detail

    def _read(
        self,
        experts: LocalExperts,
        expert: TransformersExpert,
        source: str,
        goal: Goal,
        passages: Sequence[Passage],
        detail: Detail,
    ) -> None:
        told = partial(self.progress, expert.spec.name, goal.dataset.name)
        tries, root = experts.cache / "tries", experts.cache / "scores"
        fill(root, expert, passages, source=source, detail=detail, tries=tries, progress=told)

    def _utility(
        self,
        goal: Goal,
        passages: Sequence[Passage],
        keys: Mapping[str, ExpertKey],
        generations: Generations | None,
    ) -> Utility:
        if goal.utility in CACHED:
            return self._cached(goal, ScoreCache(self.experts.cache / "scores", list(keys.values()), passages))
        if generations is not None:
            return _writing(goal, self.judging, generations)
        if isinstance(self.experts, RemoteExperts):
            raise BadParameter("workers", "processes", "left out with a server, which writes several texts at a time")
        factory = partial(_in_worker, goal, self.judging, self.experts, keys)
        return Remade(factory, name=goal.utility.value, smooth=False, items=len(goal.dataset))

    def _cached(self, goal: Goal, cache: ScoreCache) -> Utility:
        if goal.utility is UtilityName.LOGLIKELIHOOD:
            return LogLikelihood(cache)
        kind = MultipleChoice if goal.utility is UtilityName.MULTIPLE_CHOICE else Preference
        return kind(cache, goal.dataset.examples, self.judging.normalise)

    def _data_hash(self) -> str:
        digest = hashlib.sha256(f"{self.test}".encode())
        for goal in self.goals:
            digest.update(f"\n{goal.utility.value} {goal.dataset.hash}".encode())
        return digest.hexdigest()


def _passages(goal: Goal) -> list[Passage]:
    """What the score cache has to hold for a goal; nothing for one that writes text."""
    examples = goal.dataset.examples
    if goal.utility is UtilityName.LOGLIKELIHOOD:
        return LogLikelihood.passages(examples)
    if goal.utility is UtilityName.MULTIPLE_CHOICE:
        return MultipleChoice.passages(examples)
    return Preference.passages(examples) if goal.utility is UtilityName.PREFERENCE else []


def _in_worker(goal: Goal, judging: Judging, experts: LocalExperts, keys: Mapping[str, ExpertKey]) -> Utility:
    """The utility in a process that loads the experts for itself."""
    return _writing(goal, judging, experts.generations(judging.request, keys))


def _writing(goal: Goal, judging: Judging, generations: Generations) -> Utility:
    """A utility that judges texts. Raises BadParameter for a reward or a judge that is missing."""
    examples = goal.dataset.examples
    if goal.utility is UtilityName.EXACT_MATCH:
        return ExactMatch(examples, generations, extract=judging.extract, numeric=judging.numeric)
    if goal.utility is UtilityName.REGEX:
        return Regex(examples, generations)
    if goal.utility is UtilityName.JUDGE:
        if judging.judge is None:
            raise BadParameter("judge", None, "the address and the name of a model that judges")
        folder = None if generations.folder is None else generations.folder.parent / "judgements"
        return Judge(examples, generations, JudgeClient(judging.judge, folder))
    if judging.reward is None:
        raise BadParameter("reward", None, "module:function, or the directory or hub id of a sequence classifier")
    is_function = ":" in judging.reward and not Path(judging.reward).exists()
    return Reward(
        examples, generations, load_function(judging.reward) if is_function else SequenceClassifier(judging.reward)
    )


def _joined(halves: Sequence[Subset]) -> Utility:
    return halves[0] if len(halves) == 1 else Harmonic(halves)


@contextmanager
def evaluating(workers: int, ray: str | None) -> Iterator[Evaluator]:
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
