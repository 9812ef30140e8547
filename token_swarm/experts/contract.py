"""The expert contract: what a backend must do to take part in an ensemble.

The laws an implementation must keep are in `token_swarm.experts.laws`, as assertions any test can call.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from token_swarm.vocabulary import Vocabulary


class Rows(enum.Enum):
    """Which logit rows a forward returns."""

    NONE = "none"
    LAST = "last"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Open:
    """Start sequence `sequence` holding `tokens` (at least one)."""

    sequence: int
    tokens: tuple[int, ...]
    rows: Rows = Rows.LAST


@dataclass(frozen=True, slots=True)
class Extend:
    """Append `tokens` (at least one) to a sequence."""

    sequence: int
    tokens: tuple[int, ...]
    rows: Rows = Rows.LAST


@dataclass(frozen=True, slots=True)
class Fork:
    """Copy `sequence` to the unused id `new`."""

    sequence: int
    new: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep the first `length` tokens (0 <= length <= current length) of a sequence."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Close:
    """Free a sequence. Closing an unknown sequence is not an error: it makes clean-up idempotent."""

    sequence: int


Op: TypeAlias = Open | Extend | Fork | Truncate | Close


class OpErrorKind(enum.Enum):
    """Why one operation of a step was refused."""

    UNKNOWN_SEQUENCE = "unknown sequence"
    SEQUENCE_EXISTS = "sequence exists"
    CONTEXT_FULL = "context full"
    NO_FREE_SEQUENCE = "no free sequence"
    INVALID = "invalid operation"


@dataclass(frozen=True, slots=True)
class OpError:
    """One refused operation. It had no effect; the other operations of its step did."""

    kind: OpErrorKind
    message: str


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step returned.

    `logits`: [rows, vocabulary width], CPU, the expert's dtype, the rows of all operations one after another.
    `spans[i]`: the half-open range of rows that belongs to operation i (empty for operations without rows).
    `errors[i]`: None, or why operation i was refused.
    """

    logits: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    errors: tuple[OpError | None, ...]

    def rows(self, index: int) -> torch.Tensor:
        """Logit rows of operation `index`: [n, width]."""
        start, stop = self.spans[index]
        # None are no view: whoever keeps it would keep the memory of all the others.
        return self.logits[start:stop] if start < stop else self.logits.new_empty(0, self.logits.shape[1])


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as one expert sees it.

    `tokens` includes what is private to the expert (BOS, chat template). `tail` is the number of bytes at the
    end of the prompt's text that its last token writes: 0 when the last token writes no bytes. The byte unit
    takes that token back and keeps its bytes pending, so that a prompt that ends inside a word is continued
    correctly.
    """

    tokens: tuple[int, ...]
    tail: int


@dataclass(frozen=True)
class ExpertSpec:
    """What an ensemble must know of an expert.

    `canonical` is a digest of how the expert's tokenizer splits a fixed probe text; experts with equal
    vocabularies and equal `canonical` form one group. `max_context` counts tokens per sequence.
    """

    name: str
    architecture: str
    vocabulary: Vocabulary
    canonical: str
    max_context: int
    max_sequences: int
    dtype: torch.dtype
    has_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """What an expert holds now. `tokens`, `capacity`: KV positions in use and in all. `engine`: the backend's own
    gauges, by its own names."""

    sequences: int
    tokens: int
    capacity: int
    engine: Mapping[str, float] = field(default_factory=dict)


class Expert(Protocol):
    """A causal language model with its own tokenizer and its own KV cache."""

    @property
    def spec(self) -> ExpertSpec:
        """Constant facts about the expert."""
        ...

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """Render and tokenize a prompt; with `chat`, as the user turn of the expert's chat template.

        An expert without a chat template reads the plain prompt either way. The empty prompt becomes the
        token a text starts with (BOS, else end-of-text), so that there is always a context to condition on.
        """
        ...

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Canonical tokens of `text` alone, without anything private: `vocabulary.text(tokens) == text`."""
        ...

    def step(self, ops: Sequence[Op]) -> StepResult:
        """Apply `ops`. Equal to applying them one by one, but as few forwards as possible are run.

        Sequences of different lengths and different numbers of new tokens share a forward. An operation that
        cannot be applied is reported in `errors` and has no effect.
        """
        ...

    def stats(self) -> ExpertStats:
        """What is held now. Called from the thread that calls `step`, between steps."""
        ...

    def close(self) -> None:
        """Free the model and every sequence."""
        ...


RowMemory: TypeAlias = Callable[[int], torch.Tensor]
"""Gives memory for at most so many logit rows: [rows, vocabulary width], CPU, the expert's dtype."""


@runtime_checkable
class RowWriter(Protocol):
    """An expert that can put logit rows where its host wants them, which spares a copy of all of them."""

    def step_into(self, ops: Sequence[Op], memory: RowMemory | None) -> StepResult:
        """As `Expert.step`; `logits` begin where the memory does, if there is any."""
        ...
