"""One expert's own next-byte laws along given passages: what the score cache holds."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.score import CHUNK, CanonicalPath, scored_text
from token_swarm.errors import BadLogits, ExpertFault, PromptTooLong, TextTooLong
from token_swarm.experts.contract import Close, Expert, Extend, Fork, Op, Open, Rows
from token_swarm.mixing.byte_law import SYMBOLS, Array, ByteLaw, LawMaker
from token_swarm.mixing.groups import Group
from token_swarm.mixing.trie import ByteTrie
from token_swarm.particle import Rule
from token_swarm.search.score_cache.tape import Tape
from token_swarm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Passage:
    """A text to score after a prompt, which is not scored; `chat`: the prompt is a user's turn."""

    prompt: str
    text: str
    chat: bool = False

    @property
    def size(self) -> int:
        """Bytes that are scored."""
        return len(self.text.encode())


class Detail(enum.IntEnum):
    """How much of what an expert says is kept; each level holds the ones before it."""

    BYTES = 0
    """Next-byte laws: enough for experts that are mixed byte by byte."""
    MASSES = 1
    """What experts that share a vocabulary need to be mixed linearly, token by token."""
    ROWS = 2
    """Whole logit rows: everything else, temperatures included. Large: see `LawReader.row_bytes`."""


@dataclass(frozen=True)
class PassageLaws:
    """laws: float64 [bytes, 257], the law before each byte of the text; token_log_prob: nats of its `tokens` tokens.

    From Detail.MASSES on: path, tape, masses [masses] and roots [rows, 257] (see `Tape`); at Detail.ROWS: rows
    [rows, width].
    """

    laws: Array
    token_log_prob: float
    tokens: int
    path: CanonicalPath | None = None
    tape: Tape | None = None
    masses: Array | None = None
    roots: Array | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class LeftOut:
    """A passage that an expert cannot read, and why. too_long: a longer context would mend it."""

    reason: str
    too_long: bool = False


class LawReader:
    """Reads passages with one expert, as `token_swarm.decoding.score` does for an ensemble of it alone.

    Passages that follow one another and share their context share its forward.
    """

    def __init__(self, expert: Expert, tries: Path | None = None, detail: Detail = Detail.BYTES) -> None:
        """tries: folder in which the vocabulary's trie is kept."""
        spec = expert.spec
        self._detail = detail
        self._expert, self._name = expert, spec.name
        self._ensemble = Ensemble.of({spec.name: spec}, tries)
        self._group = Group((spec,), (1.0,), (1.0,), 1.0, Rule.LINEAR)

    def read(self, passages: Iterable[Passage]) -> Iterator[PassageLaws | LeftOut]:
        """The laws of each passage, in order, or why the expert has none.

        Raises ExpertFault when the expert breaks its contract; a passage that it cannot read is no reason to lose the
        others.
        """
        paths = ((passage, self._path_or_reason(passage)) for passage in passages)
        for context, run in groupby(paths, key=lambda pair: None if isinstance(pair[1], LeftOut) else pair[1].context):
            if context is None:
                yield from (path for _, path in run if isinstance(path, LeftOut))
            else:
                yield from self._read_shared(context, [own for own in run if not isinstance(own[1], LeftOut)])

    def row_bytes(self, passages: Iterable[Passage]) -> int:
        """Size of the logit rows of `passages`, in the expert's dtype."""
        spec = self._expert.spec
        paths = (self._path_or_reason(passage) for passage in passages)
        rows = sum(len(path.tokens) for path in paths if not isinstance(path, LeftOut))
        return rows * spec.vocabulary.width * spec.dtype.itemsize

    def _path_or_reason(self, passage: Passage) -> CanonicalPath | LeftOut:
        try:
            return self._path(passage)
        except ValueError as error:  # what does not fit, or cannot be encoded
            return LeftOut(str(error), too_long=isinstance(error, PromptTooLong | TextTooLong))

    def _path(self, passage: Passage) -> CanonicalPath:
        spec, encoded = self._expert.spec, self._expert.encode(passage.prompt, chat=passage.chat)
        tokens = self._expert.tokenize(scored_text(spec, encoded, passage.text)[1])
        return CanonicalPath.of(spec, encoded, passage.text, tokens)

    def _read_shared(
        self, context: tuple[int, ...], shared: Sequence[tuple[Passage, Any]]
    ) -> Iterator[PassageLaws | LeftOut]:
        """shared: passages and their CanonicalPath, all after `context`."""
        base, branch = 0, 1
        try:
            first = self._forward(Open(base, context, Rows.LAST))
            for index, (passage, path) in enumerate(shared):
                last = index == len(shared) - 1
                sequence = base if last else branch
                if not last:
                    self._forward(Fork(base, branch))
                try:
                    laws: PassageLaws | LeftOut = self._follow(passage, path, self._rows(first, sequence, path.tokens))
                except (BadLogits, _RuledOut) as error:
                    laws = LeftOut(str(error))
                yield laws
                self._forward(Close(sequence))
        finally:
            self._expert.step([Close(base), Close(branch)])

    def _rows(self, first: Tensor, sequence: int, tokens: Sequence[int]) -> Iterator[list[Tensor]]:
        """Logit rows [width] after the context and after each of `tokens` but the last.

        In the scorer's pieces: a model in bfloat16 gives other logits when it reads in others, 1e-3 bits a byte apart.
        """
        yield from ([row] for row in first)
        for start in range(0, len(tokens) - 1, CHUNK):
            piece = tuple(tokens[start : min(start + CHUNK, len(tokens) - 1)])
            yield from ([row] for row in self._forward(Extend(sequence, piece, Rows.ALL)))

    def _forward(self, op: Op) -> Tensor:
        result = self._expert.step([op])
        if result.errors[0] is not None:
            raise ExpertFault(self._name, result.errors[0].message)
        return result.rows(0)

    def _follow(self, passage: Passage, path: CanonicalPath, rows: Iterator[list[Tensor]]) -> PassageLaws:
        text, vocabulary = passage.text.encode(), self._group.vocabulary
        trie = self._ensemble.tries[vocabulary.fingerprint]
        kept = _Kept(trie, vocabulary, path, text) if self._detail else None
        token_log_prob = 0.0

        def see(row: int, logits: Sequence[Tensor], law: ByteLaw) -> None:
            nonlocal token_log_prob
            token = path.tokens[row]
            position = law.trie.position(token, vocabulary.token_bytes[token] or b"")
            with np.errstate(divide="ignore"):
                token_log_prob += float(np.log(law.probabilities[position]))
            if kept is not None:
                kept.tape.read(row, law, kept.masses, kept.roots)
                if self._detail is Detail.ROWS:
                    kept.rows.append(logits[0].clone())

        laws = follow(self._ensemble, self._group, path, text, rows, see)
        at = len(laws) - 1
        if not laws[at, text[at]] > 0:
            raise _RuledOut(
                self._name, f"byte {at} of the text {_shown(passage.text)} has probability 0: it cannot be cached"
            )
        if kept is None:
            return PassageLaws(laws, token_log_prob, len(path.tokens))
        whole = torch.stack(kept.rows) if kept.rows else None
        return PassageLaws(laws, token_log_prob, len(path.tokens), path, kept.tape, kept.masses, kept.roots, whole)


def follow(
    ensemble: Ensemble,
    group: Group,
    path: CanonicalPath,
    text: bytes,
    rows: Iterator[Sequence[Tensor]],
    see: Callable[[int, Sequence[Tensor], ByteLaw], None] | None = None,
) -> Array:
    """A group's next-byte laws along `text`, as the scorer has them: float64 [bytes, 257].

    rows: of each canonical token in turn, the logit row of each member. see: called with the token's number, its rows
    and their law. Ends after a byte that has probability 0, so that fewer laws than bytes may come.
    Raises BadLogits.
    """
    unit = ensemble.score_unit((group,), dict.fromkeys(group.names, path.prompt))
    make = LawMaker(ensemble.tries[group.vocabulary.fingerprint], group.vocabulary.eos_ids)
    state, laws = unit.states[0], np.empty((len(text), SYMBOLS))
    for at, byte in enumerate(text):
        while (head := path.head(state.cold)) is not None:
            logits = next(rows)
            # The unit would also make each member's own law, which only shares of credit are made of.
            law = unit.make_law(0, logits) if len(group.names) == 1 else make(group.token_law(logits))
            state.feed(head, law)
            if see is not None:
                see(len(head.tokens) - len(path.context), logits, law)
        laws[at] = state.law()
        if not laws[at, byte] > 0:
            return laws[: at + 1]
        unit.advance(byte)
    return laws


class _RuledOut(ExpertFault):
    """An expert gives a byte that is there probability 0."""


class _Kept:
    """What is kept of a passage beyond its byte laws."""

    def __init__(self, trie: ByteTrie, vocabulary: Vocabulary, path: CanonicalPath, text: bytes) -> None:
        self.tape = Tape.of(trie, vocabulary, path, text)
        self.masses = np.zeros(len(self.tape.intervals))
        self.roots = np.zeros((self.tape.rows, SYMBOLS))
        self.rows: list[Tensor] = []


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
