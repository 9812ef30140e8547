"""Random operations on sequences, and what their logits should be: those of the model's plain forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from token_swarm.experts.contract import Close, Expert, Extend, Fork, Op, Open, Rows, Truncate
from token_swarm.experts.tokenizer.numbering import Numbering

TEXT = (Path(__file__).parents[1] / "data" / "prose.txt").read_text(encoding="utf-8")


class Reference:
    """A model on transformers, without a cache, for tokens and rows of an expert on it."""

    def __init__(self, directory: Path, numbering: Numbering) -> None:
        self._numbering = numbering
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def rows(self, histories: Sequence[tuple[int, ...]], counts: Sequence[int]) -> list[torch.Tensor]:
        """The last `counts[i]` logit rows of each history: [count, width]."""
        return [self._rows(history, count) for history, count in zip(histories, counts, strict=True)]

    def _rows(self, history: tuple[int, ...], count: int) -> torch.Tensor:
        inputs = torch.tensor([self._numbering.to_model(history)])
        with torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=inputs, use_cache=False, logits_to_keep=count).logits[0]
        return logits[:, self._numbering.columns]


def random_steps(
    expert: Expert, rng: np.random.Generator, *, operations: int, sequences: int, longest: int
) -> Iterator[tuple[list[Op], dict[int, tuple[int, ...]]]]:
    """Steps of up to six operations, in all `operations`, and for those that return rows the history they follow.

    The tokens are pieces of a text. After tokens drawn at random Gemma 3 has logits of several hundred, of which
    float32 leaves no 1e-3: transformers itself is that far from float64.
    """
    text = np.asarray(expert.tokenize(TEXT))
    held: dict[int, tuple[int, ...]] = {}
    done = 0
    while done < operations:
        ops: list[Op] = []
        histories: dict[int, tuple[int, ...]] = {}
        for _ in range(min(int(rng.integers(1, 7)), operations - done)):
            op = _random_op(text, rng, held, sequences, longest)
            if isinstance(op, Open | Extend) and op.rows is not Rows.NONE:
                histories[len(ops)] = held[op.sequence]
            ops.append(op)
        done += len(ops)
        yield ops, histories
    yield [Close(sequence) for sequence in held], {}


def _piece(text: np.ndarray, rng: np.random.Generator, count: int) -> tuple[int, ...]:
    start = int(rng.integers(len(text) - count))
    return tuple(text[start : start + count].tolist())


def _random_op(
    text: np.ndarray, rng: np.random.Generator, held: dict[int, tuple[int, ...]], sequences: int, longest: int
) -> Op:
    sequence = int(rng.integers(sequences))
    rows = (Rows.LAST, Rows.ALL, Rows.NONE)[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]
    if sequence not in held:
        if held and rng.random() < 0.4:
            source = int(rng.choice(list(held)))
            held[sequence] = held[source]
            return Fork(source, sequence)
        held[sequence] = _piece(text, rng, int(rng.integers(1, longest)))
        return Open(sequence, held[sequence], rows)
    choice = rng.random()
    if choice < 0.1:
        del held[sequence]
        return Close(sequence)
    if choice < 0.35 or len(held[sequence]) >= longest:
        length = int(rng.integers(0, len(held[sequence]) + 1))
        held[sequence] = held[sequence][:length]
        return Truncate(sequence, length)
    new = _piece(text, rng, int(rng.integers(1, min(12, longest - len(held[sequence])) + 1)))
    held[sequence] += new
    return Extend(sequence, new, rows)


def run_and_compare(
    expert: Expert, reference: Reference, steps: Iterator[tuple[list[Op], dict[int, tuple[int, ...]]]]
) -> float:
    """Run the steps; the largest absolute difference of a logit."""
    worst = 0.0
    for ops, histories in steps:
        result = expert.step(ops)
        assert result.errors == (None,) * len(ops)
        counts = [result.rows(index).shape[0] for index in histories]
        for index, expected in zip(histories, reference.rows(list(histories.values()), counts), strict=True):
            worst = max(worst, float((result.rows(index) - expected).abs().max()))
    return worst
