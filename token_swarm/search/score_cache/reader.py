"""One expert's own next-byte laws along given passages: what the score cache holds."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.score import CHUNK, CanonicalPath, scored_text
from token_swarm.errors import ExpertFault
from token_swarm.experts.contract import Close, Expert, Extend, Fork, Op, Open, Rows
from token_swarm.mixing.byte_law import SYMBOLS, Array
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

    From Detail.MASSES on: tape, masses [masses] and roots [rows, 257] (see `Tape`); at Detail.ROWS: rows [rows, width].
    """

    laws: Array
    token_log_prob: float
    tokens: int
    tape: Tape | None = None
    masses: Array | None = None
    roots: Array | None = None
    rows: Tensor | None = None


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

    def read(self, passages: Iterable[Passage]) -> Iterator[PassageLaws]:
        """The laws of each passage, in order.

        Raises PromptTooLong, and ExpertFault when the expert breaks its contract or rules out what is there.
        """
        paths = ((passage, self._path(passage)) for passage in passages)
        for context, shared in groupby(paths, key=lambda pair: pair[1].context):
            yield from self._read_shared(context, list(shared))

    def row_bytes(self, passages: Iterable[Passage]) -> int:
        """Size of the logit rows of `passages`, in the expert's dtype."""
        spec = self._expert.spec
        rows = sum(len(self._path(passage).tokens) for passage in passages)
        return rows * spec.vocabulary.width * spec.dtype.itemsize

    def _path(self, passage: Passage) -> CanonicalPath:
        spec, encoded = self._expert.spec, self._expert.encode(passage.prompt, chat=passage.chat)
        tokens = self._expert.tokenize(scored_text(spec, encoded, passage.text)[1])
        return CanonicalPath.of(spec, encoded, passage.text, tokens)

    def _read_shared(
        self, context: tuple[int, ...], shared: Sequence[tuple[Passage, CanonicalPath]]
    ) -> Iterator[PassageLaws]:
        base, branch = 0, 1
        try:
            first = self._forward(Open(base, context, Rows.LAST))
            for index, (passage, path) in enumerate(shared):
                last = index == len(shared) - 1
                sequence = base if last else branch
                if not last:
                    self._forward(Fork(base, branch))
                yield self._follow(passage, path, self._rows(first, sequence, path.tokens[:-1]))
                self._forward(Close(sequence))
        finally:
            self._expert.step([Close(base), Close(branch)])

    def _rows(self, first: Tensor, sequence: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Logit rows [width] after the context and after each of `tokens`.

        In the scorer's pieces: a model in bfloat16 gives other logits when it reads in others, 1e-3 bits a byte apart.
        """
        yield from first
        for start in range(0, len(tokens), CHUNK):
            yield from self._forward(Extend(sequence, tuple(tokens[start : start + CHUNK]), Rows.ALL))

    def _forward(self, op: Op) -> Tensor:
        result = self._expert.step([op])
        if result.errors[0] is not None:
            raise ExpertFault(self._name, result.errors[0].message)
        return result.rows(0)

    def _follow(self, passage: Passage, path: CanonicalPath, rows: Iterator[Tensor]) -> PassageLaws:
        unit = self._ensemble.score_unit((self._group,), {self._name: path.prompt})
        state, vocabulary = unit.states[0], self._group.vocabulary
        laws = np.empty((passage.size, SYMBOLS))
        token_log_prob = 0.0
        trie = self._ensemble.tries[vocabulary.fingerprint]
        kept = _Kept(trie, vocabulary, path, passage.text.encode()) if self._detail else None
        for at, byte in enumerate(passage.text.encode()):
            while (head := path.head(state.cold)) is not None:
                row = len(head.tokens) - len(path.context)
                token = path.tokens[row]
                logits = next(rows)
                law = unit.make_law(0, [logits])
                position = law.trie.position(token, vocabulary.token_bytes[token] or b"")
                with np.errstate(divide="ignore"):
                    token_log_prob += float(np.log(law.probabilities[position]))
                state.feed(head, law)
                if kept is not None:
                    kept.tape.read(row, law, kept.masses, kept.roots)
                if kept is not None and self._detail is Detail.ROWS:
                    kept.rows.append(logits.clone())
            laws[at] = state.law()
            if not laws[at, byte] > 0:
                raise ExpertFault(
                    self._name, f"byte {at} of the text {_shown(passage.text)} has probability 0: it cannot be cached"
                )
            unit.advance(byte)
        if kept is None:
            return PassageLaws(laws, token_log_prob, len(path.tokens))
        whole = torch.stack(kept.rows) if kept.rows else None
        return PassageLaws(laws, token_log_prob, len(path.tokens), kept.tape, kept.masses, kept.roots, whole)


class _Kept:
    """What is kept of a passage beyond its byte laws."""

    def __init__(self, trie: ByteTrie, vocabulary: Vocabulary, path: CanonicalPath, text: bytes) -> None:
        self.tape = Tape.of(trie, vocabulary, path, text)
        self.masses = np.zeros(len(self.tape.intervals))
        self.roots = np.zeros((self.tape.rows, SYMBOLS))
        self.rows: list[Tensor] = []


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
