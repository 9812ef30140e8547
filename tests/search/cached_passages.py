"""Passages, mixtures of toy experts and score caches of them, as the tests of the score cache use them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.laws.ensembles import DUPLICATES, LONG, NESTED
from token_swarm.experts.contract import Expert, Op, StepResult
from token_swarm.particle import Mixture, Rule
from token_swarm.search.score_cache.cache import SHARD, ScoreCache, fill
from token_swarm.search.score_cache.reader import Passage

VOCABULARIES = [NESTED, DUPLICATES, LONG]
PASSAGES = [
    Passage("", "abcab"),
    Passage("ab", "cabcaabc"),
    Passage("ab", "c"),
    Passage("ab", "aaa", chat=True),
    Passage("aba", "bcabcabcaaaabcb" * 6),
    *(Passage("c" * i, "abc"[i % 3] * (i + 1)) for i in range(SHARD)),
]
MIXTURES = [
    Mixture({"e0": 1.0}, Rule.LINEAR),
    Mixture({"e0": 3.0, "e1": 1.0, "e2": 2.0}, Rule.LINEAR),
    Mixture({"e0": 0.0, "e1": 0.3, "e2": 0.7}, Rule.LINEAR),
    Mixture({"e1": 1.0}),
    Mixture({"e0": 0.4, "e1": 0.9, "e2": -0.4}),
    Mixture({"e2": 1.3, "e0": 0.8}, temperatures={"e0": 1.0}),
]


class Counting:
    """Counts the steps and the tokens an expert is asked for, and may stop working."""

    def __init__(self, inner: Expert, fail_after: int = 10**9) -> None:
        self.inner, self.spec, self.encode, self.tokenize = inner, inner.spec, inner.encode, inner.tokenize
        self.steps = self.tokens = 0
        self.fail_after = fail_after

    def step(self, ops: Sequence[Op]) -> StepResult:
        self.steps += 1
        self.tokens += sum(len(getattr(op, "tokens", ())) for op in ops)
        if self.steps > self.fail_after:
            raise ConnectionError("the plug was pulled")
        return self.inner.step(ops)

    def close(self) -> None:
        self.inner.close()


def build(
    root: Path, experts: dict[str, Expert], passages: Sequence[Passage] = PASSAGES, tries: Path | None = None
) -> ScoreCache:
    return ScoreCache(root, [fill(root, expert, passages, tries=tries) for expert in experts.values()], passages)
