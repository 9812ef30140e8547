"""Shares the forward of a prompt among all mixtures that continue it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from token_swarm.errors import BadParameter
from token_swarm.experts.contract import (
    Close,
    EncodedPrompt,
    Expert,
    ExpertSpec,
    ExpertStats,
    Extend,
    Fork,
    Op,
    Open,
    Rows,
    StepResult,
)

# Sequence ids of kept prefixes: far from those that decoders are given.
_KEPT = 2**40
SHORTEST = 8
"""Tokens below which keeping a prefix is not worth a sequence."""


class PrefixSharing:
    """An expert that opens a sequence by forking one that holds the same tokens already.

    All tokens but the last are read in one forward of their own and kept, whether they are met again or not: so a
    text does not depend on what was read before it. `keep` sequences of the expert are used for that.
    """

    def __init__(self, expert: Expert, keep: int = 2) -> None:
        """Raises BadParameter when the expert would have fewer than two sequences left."""
        most = expert.spec.max_sequences - 2
        if not 1 <= keep <= most:
            raise BadParameter("keep", keep, f"1 to {most}, two less than max_sequences of {expert.spec.name}")
        self._expert, self._keep = expert, keep
        self._held: OrderedDict[tuple[int, ...], int] = OrderedDict()
        self._next = _KEPT

    @property
    def spec(self) -> ExpertSpec:
        """The inner expert's, less the sequences that are kept."""
        inner = self._expert.spec
        return ExpertSpec(**{**inner.__dict__, "max_sequences": inner.max_sequences - self._keep})

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """See `Expert.encode`."""
        return self._expert.encode(prompt, chat=chat)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """See `Expert.tokenize`."""
        return self._expert.tokenize(text)

    def stats(self) -> ExpertStats:
        """See `Expert.stats`; the prefixes that are kept count too."""
        return self._expert.stats()

    def close(self) -> None:
        """See `Expert.close`."""
        self._held.clear()
        self._expert.close()

    def step(self, ops: Sequence[Op]) -> StepResult:
        """See `Expert.step`. Prefixes that are new are read first, each in a step of its own."""
        inner: list[Op] = []
        places: list[tuple[int, int]] = []  # of each operation: its first inner operation, and the one with its rows
        needed: set[tuple[int, ...]] = set()
        for op in ops:
            first = len(inner)
            inner.extend(self._through_fork(op, needed))
            places.append((first, len(inner) - 1))
        result = self._run(inner)
        spans = tuple(result.spans[last] for _, last in places)
        return StepResult(result.logits, spans, tuple(result.errors[i] or result.errors[j] for i, j in places))

    def _run(self, ops: Sequence[Op]) -> StepResult:
        try:
            return self._expert.step(ops)
        except BaseException:
            # An expert whose forward fails has closed its sequences.
            self._held.clear()
            raise

    def _through_fork(self, op: Op, needed: set[tuple[int, ...]]) -> list[Op]:
        """The operation itself, or a fork of a kept prefix and its last token. `needed`: prefixes of this step."""
        if not isinstance(op, Open) or len(op.tokens) < SHORTEST or op.rows is Rows.ALL:
            return [op]
        prefix = op.tokens[:-1]
        kept = self._kept(prefix, needed)
        if kept is None:
            return [op]
        needed.add(prefix)
        return [Fork(kept, op.sequence), Extend(op.sequence, op.tokens[-1:], op.rows)]

    def _kept(self, prefix: tuple[int, ...], needed: set[tuple[int, ...]]) -> int | None:
        """The sequence that holds `prefix`; None when there is no room, or when opening it will show why not."""
        if prefix in self._held:
            self._held.move_to_end(prefix)
            return self._held[prefix]
        if len(self._held) == self._keep:
            oldest = next((held for held in self._held if held not in needed), None)
            if oldest is None:
                return None
            self._run([Close(self._held.pop(oldest))])
        self._next += 1
        if self._run([Open(self._next, prefix, Rows.NONE)]).errors[0] is not None:
            return None
        self._held[prefix] = self._next
        return self._next
