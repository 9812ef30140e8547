"""Teacher-forced scoring: the log-probability of a text, in one chunked pass per expert (sans-I/O).

Only the canonical tokenization of the text is forwarded, so each expert reads it once. The byte law at a position
is marginalised over every tokenization that shares a canonical history: the tokens that are under way, and the
tokens that end here but not in the canonical tokenization of the whole text (`bridge`, when the text goes on to
`bridges`). The next byte of the latter is estimated, as for any cold head (see `mixing.byte_group`); one byte later
they are given up, which `retired` counts. Every step's law adds up to 1, so the log-probabilities are
an honest code length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.forwards import MAX_RECOVERIES, Calls, Outcome
from token_swarm.errors import BadParameter, ExpertFault, TextChanged, TextTooLong
from token_swarm.experts.contract import (
    Close,
    EncodedPrompt,
    ExpertSpec,
    Extend,
    Open,
    OpErrorKind,
    Rows,
)
from token_swarm.mixing.byte_law import ByteLaw
from token_swarm.mixing.byte_unit import ByteUnit, ColdHead
from token_swarm.mixing.groups import Group
from token_swarm.mixing.log_unit import LogHead, LogLaw, LogUnit
from token_swarm.particle import Mixture, Rule

UNDERFLOW = math.log(1e-30)
"""A log-probability below this may have lost digits, or be -inf, for want of range: such a text is scored again in
logarithms."""

CHUNK = 32
"""Tokens of one forward: bounds the logits in flight (32 rows of 262,144 float32 are 34 MB)."""

_Head = TypeVar("_Head", ColdHead, LogHead)


@dataclass
class ExpertScore:
    """One expert's own log-probabilities, nats. `token_log_prob` is its ordinary token-level figure."""

    tokens: int
    token_log_prob: float = 0.0
    per_byte: list[float] = field(default_factory=list)

    @property
    def log_prob(self) -> float:
        """Log-probability of the text, byte by byte."""
        return float(np.sum(self.per_byte))


@dataclass(frozen=True)
class ScoredWindow:
    """Bytes that were scored in one pass. context: bytes of the text before them that every expert had read."""

    start: int
    length: int
    context: int


@dataclass
class Score:
    """Log-probabilities (nats) of a text of `length` bytes. retired: see `ByteGroup`.

    windows: of a text that was scored in several passes, which had `stride` bytes each after the first; else empty.
    """

    length: int
    experts: dict[str, ExpertScore]
    per_byte: list[float] = field(default_factory=list)
    retired: float = 0.0
    stride: int = 0
    windows: list[ScoredWindow] = field(default_factory=list)

    @property
    def log_prob(self) -> float:
        """Log-probability of the text under the ensemble."""
        return float(np.sum(self.per_byte))

    def bits_per_byte(self, expert: str | None = None) -> float:
        """Code length in bits per byte, of the ensemble or of one expert."""
        total = self.log_prob if expert is None else self.experts[expert].log_prob
        return -total / (math.log(2) * self.length)


@dataclass(frozen=True)
class CanonicalPath:
    """One expert's canonical way through a text: `tokens` after `context`.

    prompt: the prompt as the byte unit is to take it, with the tail that `tokens` writes again.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    prompt: EncodedPrompt

    @classmethod
    def of(cls, spec: ExpertSpec, prompt: EncodedPrompt, text: str, tokens: Sequence[int]) -> CanonicalPath:
        """tokens: the canonical tokens of what `scored_text` says.

        Raises TextTooLong, and TextChanged when the tokens do not write the text.
        """
        context, whole = scored_text(spec, prompt, text)
        length = len(context) + len(tokens)
        if length > spec.max_context:
            raise TextTooLong(spec.name, length, spec.max_context)
        written = spec.vocabulary.text(tokens)
        if written != whole.encode():
            raise TextChanged(whole, written)
        taken = prompt if len(context) < len(prompt.tokens) else EncodedPrompt(context, 0)
        return cls(context, tuple(tokens), taken)

    def head(self, heads: Sequence[_Head]) -> _Head | None:
        """The head whose history lies on this way and has more of it to come, if there is one."""
        start = len(self.context)
        for head in heads:
            row = len(head.tokens) - start
            if row < len(self.tokens) and head.tokens[start:] == self.tokens[:row]:
                return head
        return None


@dataclass
class _Pass:
    """One expert's forwards over its path. rows[j]: logits after context + tokens[:j].

    read: tokens of the path that the expert has answered for, -1 before its context. asked: those that it was asked
    to read. is_open: whether it holds `sequence`, as far as is known.
    """

    path: CanonicalPath
    sequence: int
    rows: dict[int, Tensor] = field(default_factory=dict)
    read: int = -1
    asked: int = -1
    is_open: bool = False
    recoveries: int = 0
    law: ByteLaw | LogLaw | None = None
    law_row: int = -1

    def next_op(self) -> Open | Extend | None:
        """The next piece of the pass; the last token's row says nothing about the text."""
        if not self.is_open:
            self.is_open = True
            self.asked = max(self.read, 0)
            return Open(self.sequence, self.path.context + self.path.tokens[: self.asked], Rows.LAST)
        stop = min(self.asked + CHUNK, len(self.path.tokens) - 1)
        if stop <= self.asked:
            return None
        piece = self.path.tokens[self.asked : stop]
        self.asked = stop
        return Extend(self.sequence, piece, Rows.ALL)

    def take(self, outcome: Tensor) -> None:
        """The rows of the last piece; the one that a sequence opened again ends with was there before."""
        first = self.asked - outcome.shape[0] + 1
        self.rows.update({first + i: row for i, row in enumerate(outcome) if first + i > self.read})
        self.read = self.asked
        self.recoveries = 0


def scored_text(spec: ExpertSpec, prompt: EncodedPrompt, text: str) -> tuple[tuple[int, ...], str]:
    """(context, text to tokenize): the prompt's last token is taken back when its bytes are whole characters."""
    last = spec.vocabulary.token_bytes[prompt.tokens[-1]]
    if prompt.tail and last is not None and len(prompt.tokens) > 1:
        try:
            return prompt.tokens[:-1], last.decode() + text
        except UnicodeDecodeError:
            pass
    return prompt.tokens, text


class Scorer:
    """Scores one text under a mixture and under each of its experts."""

    def __init__(
        self,
        ensemble: Ensemble,
        mixture: Mixture,
        prompts: Mapping[str, EncodedPrompt],
        text: str,
        tokens: Mapping[str, Sequence[int]],
        allocate: Callable[[str], int],
        *,
        in_logs: bool = False,
    ) -> None:
        """tokens[expert]: canonical tokens of what `scored_text` says for that expert. in_logs: work with logarithms
        throughout, several times slower, which no probability is too small for."""
        if not text:
            raise BadParameter("text", text, "at least one byte")
        groups = ensemble.groups(mixture)
        specs = [spec for group in groups for spec in group.experts]
        paths = {spec.name: CanonicalPath.of(spec, prompts[spec.name], text, tokens[spec.name]) for spec in specs}
        self._passes = {name: _Pass(path, allocate(name)) for name, path in paths.items()}
        taken = {name: path.prompt for name, path in paths.items()}
        unit = ensemble.log_score_unit if in_logs else ensemble.score_unit
        self._unit: ByteUnit | LogUnit = unit(groups, taken)
        singles = tuple(Group((spec,), (1.0,), (1.0,), 1.0, Rule.LINEAR) for spec in specs)
        self._own: ByteUnit | LogUnit = unit(singles, taken)
        self.underflowed = False
        """Whether a probability was too small: the text is to be scored `in_logs`."""
        self._text = text.encode()
        self._at = 0
        self._asked: set[str] = set()
        self.score = Score(len(self._text), {name: ExpertScore(len(path.tokens)) for name, path in paths.items()})

    def calls(self) -> Calls:
        """The next piece of every pass that is waited for; empty when the text is scored, or `underflowed`."""
        calls: Calls = {}
        for name in self._missing() if self._at < len(self._text) and not self.underflowed else ():
            op = self._passes[name].next_op()
            if op is None:
                raise ExpertFault(name, "its tokens end before the text does")
            calls[name] = [op]
        self._asked = set(calls)
        return calls

    def resume(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Take the rows of the last `calls` and score as far as they reach.

        An expert without outcomes was lost. Its sequence, and one that an expert says it does not have, is opened
        again by the next `calls`, with what was read before.
        Raises ExpertFault when an expert keeps refusing, and BadLogits.
        """
        for name in self._asked:
            own = self._passes[name]
            if name not in outcomes:
                own.is_open = False
                continue
            (outcome,) = outcomes[name]
            if isinstance(outcome, Tensor):
                own.take(outcome)
                continue
            own.recoveries += 1
            if outcome.kind is not OpErrorKind.UNKNOWN_SEQUENCE or own.recoveries > MAX_RECOVERIES:
                raise ExpertFault(name, outcome.message)
            own.is_open = False
        while self._at < len(self._text) and not self.underflowed and not self._missing():
            self._score_byte()

    def close(self) -> Calls:
        """Operations that free the passes' KV."""
        return {name: [Close(own.sequence)] for name, own in self._passes.items() if own.is_open}

    def _missing(self) -> set[str]:
        """Feed every canonical head whose rows are here; returns the experts whose rows are not."""
        missing: set[str] = set()
        for unit in (self._unit, self._own):
            for index, group in enumerate(unit.groups):
                missing |= self._feed(unit, index, group)
        return missing

    def _feed(self, unit: ByteUnit | LogUnit, index: int, group: Group) -> set[str]:
        state: Any = unit.states[index]  # takes the laws that its unit makes
        path = self._passes[group.names[0]].path
        while (head := path.head(state.cold)) is not None:
            row = len(head.tokens) - len(path.context)
            missing = {name for name in group.names if row not in self._passes[name].rows}
            if missing:
                return missing
            state.feed(head, self._law(unit, index, group, row))
        return set()

    def _law(self, unit: ByteUnit | LogUnit, index: int, group: Group, row: int) -> ByteLaw | LogLaw:
        """A group's law after `row` tokens. Where it is also its only expert's own law, it is made once."""
        first = self._passes[group.names[0]]
        own = len(group.names) == 1 and group.exponents == (1.0,) and group.temperatures == (1.0,)
        law = first.law if own and first.law_row == row else None
        if law is None:
            law = unit.make_law(index, [self._passes[name].rows[row] for name in group.names])
        if own:
            first.law, first.law_row = law, row
        if unit is self._own:
            first.rows.pop(row)  # the ensemble's group took it first
            token = first.path.tokens[row]
            position = law.trie.position(token, group.vocabulary.token_bytes[token] or b"")
            own_log = law.log_probs[position] if isinstance(law, LogLaw) else _log(float(law.probabilities[position]))
            self.score.experts[group.names[0]].token_log_prob += float(own_log)
            self._see(float(own_log))
        return law

    def _score_byte(self) -> None:
        byte = self._text[self._at]
        mixed, _ = _step(self._unit, byte)
        _, alone = _step(self._own, byte)
        self.score.per_byte.append(mixed)
        for name, log_prob in zip(self._passes, alone, strict=True):
            self.score.experts[name].per_byte.append(log_prob)
        self._see(min(mixed, *alone))
        self._at += 1
        self.score.retired = max(self._unit.retired, self._own.retired)

    def _see(self, log_prob: float) -> None:
        self.underflowed |= log_prob < UNDERFLOW and not isinstance(self._unit, LogUnit)


def _step(unit: ByteUnit | LogUnit, byte: int) -> tuple[float, list[float]]:
    """Append a byte; returns its log-probability under the mixture of the groups and under each of them."""
    if isinstance(unit, LogUnit):
        laws = unit.log_laws()
        log_probs = float(unit.log_law(laws)[byte]), [float(law[byte]) for law in laws]
        unit.advance(byte, laws)
        return log_probs
    log_probs = _log(float(unit.law()[byte])), [_log(float(law[byte])) for law in unit.laws]
    unit.advance(byte)
    return log_probs


def _log(probability: float) -> float:
    return float(np.log(probability)) if probability > 0 else -np.inf
