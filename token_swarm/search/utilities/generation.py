"""Texts that mixtures write for the examples' prompts, each of them once, and what is judged by rule."""

from __future__ import annotations

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.files import replacing
from token_swarm.mixing.union_unit import DEFAULT_FLOOR
from token_swarm.particle import Mixture
from token_swarm.search.data import AnswerExample, Example, PatternExample
from token_swarm.search.utilities.kind import WrittenKind
from token_swarm.search.utility import Scores, as_items

Generate: TypeAlias = Callable[[str, Mixture, DecodeRequest, bool], str]
"""(prompt, mixture, request, chat) -> the text that continues the prompt."""

E = TypeVar("E", bound=Example)


def local_generate(local: LocalEnsemble) -> Generate:
    """Generates in this process."""

    def generate(prompt: str, mixture: Mixture, request: DecodeRequest, chat: bool) -> str:
        return local.generate(prompt, mixture, request, chat=chat)[0]

    return generate


@dataclass
class Generations:
    """The texts, and a folder that keeps them.

    request: how every text is decoded; its seed is the seed of the search, from which each prompt gets its own: every
    mixture draws with the same random numbers (common random numbers), so that they differ by their laws alone.
    fingerprints: what tells the experts apart, by name; part of a text's key, as are the prompt, the mixture and the
    request. folder: None keeps texts in memory only. concurrency: calls of `generate` at one time, in threads. refuses:
    says which expert cannot read an example's prompt, and why; None where all can, or nobody knows before it is tried.
    """

    generate: Generate
    request: DecodeRequest
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    concurrency: int = 1
    refuses: Callable[[Example], tuple[str, str] | None] = lambda _: None
    written: int = 0
    """Texts that were generated, not found."""
    _memory: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a concurrency below 1."""
        if self.concurrency < 1:
            raise BadParameter("concurrency", self.concurrency, "an integer >= 1")

    def texts(self, pairs: Sequence[tuple[Example, Mixture]]) -> list[str]:
        """The text of each (example, mixture). Raises what `generate` raises; finished texts stay."""
        keys = [self._key(example, mixture) for example, mixture in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if self._find(key) is None}
        if self.concurrency == 1:
            for key, pair in missing.items():
                self._write(key, *pair)
        else:
            with ThreadPoolExecutor(self.concurrency) as threads:
                waiting = [threads.submit(self._write, key, *pair) for key, pair in missing.items()]
                for future in waiting:
                    future.result()
        return [self._memory[key] for key in keys]

    def seed(self, example: Example) -> int:
        """The seed of every text for this prompt."""
        data = json.dumps([self.request.seed, example.prompt, example.chat]).encode()
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")

    def _key(self, example: Example, mixture: Mixture) -> str:
        active = mixture.active
        total = sum(active.values()) if mixture.rule.normalised else 1.0
        document = [
            example.prompt,
            example.chat,
            mixture.rule.value,
            sorted((name, weight / total) for name, weight in active.items()),
            sorted((name, t) for name, t in mixture.temperatures.items() if name in active and t != 1),
            sorted((name, mark) for name, mark in self.fingerprints.items() if name in active),
            _settings_key(replace(self.request, seed=self.seed(example))),
        ]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key}.json"

    def _find(self, key: str) -> str | None:
        path = self._path(key)
        if key not in self._memory and path is not None:
            try:
                self._memory[key] = json.loads(path.read_text(encoding="utf-8"))["text"]
            except (OSError, ValueError, KeyError, TypeError):
                return None  # missing or damaged: it is written again
        return self._memory.get(key)

    def _write(self, key: str, example: Example, mixture: Mixture) -> None:
        request = replace(self.request, seed=self.seed(example))
        text = self.generate(example.prompt, mixture, request, example.chat)
        self._memory[key] = text
        self.written += 1
        if (path := self._path(key)) is not None:
            with replacing(path) as file:
                file.write(json.dumps({"prompt": example.prompt, "text": text}, ensure_ascii=False).encode())


_FIRST_FIELDS = ("sampling", "unit", "seed", "max_bytes", "max_tokens", "stop", "epsilon", "window", "draft_tokens")


def _settings_key(request: DecodeRequest) -> str:
    """The settings of a request as part of a text's key.

    In the words in which the first texts were kept: a class or field that is renamed loses none of them. A field that
    is not among the first ones takes part where it is not at its default.
    """
    sampling = request.sampling
    shape = ", ".join(f"{name}={getattr(sampling, name)!r}" for name in ("temperature", "top_k", "top_p", "min_p"))
    known = ", ".join(f"{name}={getattr(request, name)!r}" for name in _FIRST_FIELDS[1:-1])
    text = f"shaping=Shaping({shape}), {known}, union_floor={DEFAULT_FLOOR!r}, draft_tokens={request.draft_tokens!r}"
    plain = DecodeRequest()
    for each in fields(request):
        if each.name not in _FIRST_FIELDS and getattr(request, each.name) != getattr(plain, each.name):
            text += f", {each.name}={getattr(request, each.name)!r}"
    return f"DecodeRequest({text})"


class GeneratedUtility(ABC, Generic[E]):
    """A utility that judges the text which a mixture writes for each prompt.

    values: what `judge` says; weights: 1. Examples come one after another, and the mixtures within each, so that a
    prompt is read once for all of them.
    """

    smooth = False
    by_items = True

    def __init__(self, name: str, examples: Sequence[E], generations: Generations) -> None:
        self.name, self.examples, self.generations = name, tuple(examples), generations
        self.items = len(self.examples)

    @abstractmethod
    def judge(self, example: E, text: str) -> float:
        """How good `text` is for the example; higher is better."""

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`. Raises what generating and judging raise."""
        chosen = [self.examples[i] for i in as_items(items, self.items).tolist()]
        pairs = [(example, mixture) for example in chosen for mixture in mixtures]
        texts = self.generations.texts(pairs)
        values = self.judge_all([(example, text) for (example, _), text in zip(pairs, texts, strict=True)])
        table = np.asarray(values, dtype=np.float64).reshape(len(chosen), len(mixtures)).T
        return Scores(table, np.ones(len(chosen)))

    def judge_all(self, pairs: Sequence[tuple[E, str]]) -> list[float]:
        """`judge` of each; one that can do several at once may replace it."""
        return [self.judge(example, text) for example, text in pairs]


NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
"""For `ExactMatch.extract`: the last number of the text is its answer."""


class ExactMatch(GeneratedUtility[AnswerExample]):
    """Whether the text is one of the right answers.

    extract: the answer is the last match of this expression in the text, its first group if it has one; without a match
    it is wrong. numeric: compare as numbers, to 1e-6. Otherwise surrounding white space does not count, nor case with
    `ignore_case`.
    """

    def __init__(
        self,
        examples: Sequence[AnswerExample],
        generations: Generations,
        *,
        extract: str | None = None,
        numeric: bool = False,
        ignore_case: bool = False,
    ) -> None:
        """Raises BadParameter for an expression that does not compile, or answers that are no numbers."""
        super().__init__("exact-match", examples, generations)
        try:
            self._extract = None if extract is None else re.compile(extract)
        except re.error as error:
            raise BadParameter("extract", extract, f"a regular expression ({error})") from error
        self._numeric, self._ignore_case = numeric, ignore_case
        for example in self.examples if numeric else ():
            for answer in example.answers:
                if _number(answer) is None:
                    raise BadParameter(
                        f"answers of {example.prompt!r}", answer, "numbers, when they are compared as such"
                    )

    def judge(self, example: AnswerExample, text: str) -> float:
        """1 for a right answer, else 0."""
        answer = text
        if self._extract is not None:
            matches = list(self._extract.finditer(text))
            if not matches:
                return 0.0
            answer = matches[-1][1 if self._extract.groups else 0] or ""
        return float(any(self._equal(answer, right) for right in example.answers))

    def _equal(self, answer: str, right: str) -> bool:
        if self._numeric:
            given, wanted = _number(answer), _number(right)
            return given is not None and wanted is not None and math.isclose(given, wanted, rel_tol=0, abs_tol=1e-6)
        answer, right = answer.strip(), right.strip()
        return answer.casefold() == right.casefold() if self._ignore_case else answer == right


class Regex(GeneratedUtility[PatternExample]):
    """Whether the example's expression matches somewhere in the text."""

    def __init__(self, examples: Sequence[PatternExample], generations: Generations) -> None:
        super().__init__("regex", examples, generations)

    def judge(self, example: PatternExample, text: str) -> float:
        """1 for a match, else 0."""
        return float(re.search(example.pattern, text) is not None)


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


EXACT_MATCH = WrittenKind(
    AnswerExample,
    lambda examples, texts, judging: ExactMatch(examples, texts, extract=judging.extract, numeric=judging.numeric),
    percent=True,
)
REGEX = WrittenKind(PatternExample, lambda examples, texts, _: Regex(examples, texts), percent=True)
