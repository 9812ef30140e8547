"""What backends that queue the operations of a step and forward them together have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from token_swarm.experts.contract import EncodedPrompt, ExpertSpec, Op, OpError, RowMemory, StepResult
from token_swarm.experts.ops import apply_lengths, refusal, row_count
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.experts.tokenizer.prompt import PromptEncoder


class PlannedExpert(ABC):
    """Half of an expert: its steps, and its tokenizer's part of the contract."""

    _spec: ExpertSpec
    _numbering: Numbering
    _prompts: PromptEncoder
    _lengths: dict[int, int]

    @property
    def spec(self) -> ExpertSpec:
        """Constant facts about the expert."""
        return self._spec

    @property
    def numbering(self) -> Numbering:
        """The expert's tokens beside the model's."""
        return self._numbering

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """See `Expert.encode`. What looks like a special token in `prompt` stays plain text."""
        return self._prompts.encode(prompt, chat=chat)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """See `Expert.tokenize`. Raises ValueError when the tokenizer does not reproduce `text`."""
        return self._prompts.tokenize(text)

    def step(self, ops: Sequence[Op]) -> StepResult:
        """See `Expert.step`. If a forward fails, every sequence is closed before the error is raised."""
        return self.step_into(ops, None)

    def step_into(self, ops: Sequence[Op], memory: RowMemory | None) -> StepResult:
        """See `RowWriter.step_into`."""
        bound = sum(map(row_count, ops))
        width, dtype = self._spec.vocabulary.width, self._spec.dtype
        logits = torch.empty(bound, width, dtype=dtype) if memory is None else memory(bound)
        spans: list[tuple[int, int]] = []
        errors: list[OpError | None] = []
        row = 0
        try:
            for op in ops:
                error = refusal(op, self._lengths, self._spec)
                first = row
                if error is None:
                    self._plan(self._numbering.op_to_model(op), first, logits)
                    apply_lengths(op, self._lengths)
                    row += row_count(op)
                errors.append(error)
                spans.append((first, row))
            self._flush(logits)
        except BaseException:
            self._release_all()
            raise
        return StepResult(logits[:row], tuple(spans), tuple(errors))

    @abstractmethod
    def _plan(self, op: Op, row: int, logits: torch.Tensor) -> None:
        """Queue an operation, in the model's tokens. `row`: its first of `logits`; `_lengths` are those before it."""

    @abstractmethod
    def _flush(self, logits: torch.Tensor) -> None:
        """Forward what is queued, and write the rows, with their columns in the order of the expert's tokens."""

    @abstractmethod
    def _release_all(self) -> None:
        """Close every sequence, and forget what is queued."""
