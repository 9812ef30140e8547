"""The check at start: sessions that are appended to and rolled back must give what plain requests of vLLM give.

Sessions rest on parts of vLLM that it does not call public, and their two known failures are silent. A version or a
model for which they do not work is found here, before it can answer anybody.
"""

from __future__ import annotations

import numpy as np
import torch

from token_swarm.experts.contract import Close, Expert, Extend, Fork, Op, Open, Rows, Truncate
from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.experts.vllm.engine import VllmEngine

SEQUENCES = 3
"""Sequences that the check opens."""

CONTEXT = 24
"""Shortest context that the check can work in."""

_LAST = 16
"""Rows of a text that are compared: all that an operation of the check returns."""

_LONGEST_WINDOW = 8192
"""Windows up to this size are passed in the check."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference that rounding explains."""


def check_sessions(expert: Expert, engine: VllmEngine, numbering: Numbering) -> None:
    """Compare sessions of `expert`, which has none open, with plain requests of its `engine`.

    Covers a ragged batch, chunks, rows of every token, rollbacks, a fork and, where the context reaches beyond it,
    the sliding window. Raises ExpertLoadError when they differ by more than rounding.
    """
    spec = expert.spec
    window = engine.sliding_window or 0
    if window > _LONGEST_WINDOW:
        window = 0
    size = min(CONTEXT + (window + engine.block_size if window else 0), spec.max_context)
    ids = np.flatnonzero(spec.vocabulary.allowed)
    draw = np.random.default_rng(0).choice(ids, size=size + 12).tolist()
    long, short, wrong = tuple(draw[:size]), tuple(draw[size : size + 8]), tuple(draw[size + 8 :])
    cut = size - 12
    # Behind a window: so far back that a block is needed again which the window had left.
    back = min(cut - 3, window + 9) if window else cut - 3
    mistake, branch = long[:cut] + wrong, long[:back] + wrong
    plain = {text: _Plain(engine, text, numbering, spec.architecture) for text in (long, short, mistake, branch)}
    steps: list[list[tuple[Op, tuple[int, ...]]]] = [
        [(Open(0, long[:cut]), long[:cut]), (Open(1, short[:3], Rows.ALL), short[:3])],
        [(Extend(0, wrong, Rows.ALL), mistake), (Extend(1, short[3:4]), short[:4])],
        [
            (Truncate(0, cut), ()),
            (Extend(0, long[cut : cut + 6], Rows.ALL), long[: cut + 6]),
            (Extend(1, short[4:], Rows.ALL), short),
        ],
        [(Fork(0, 2), ()), (Extend(0, long[cut + 6 :], Rows.ALL), long)],
        [(Truncate(0, back), ()), (Extend(0, wrong, Rows.ALL), branch)],
        [(Extend(2, long[cut + 6 :], Rows.ALL), long)],
    ]
    for step in steps:
        result = expert.step([op for op, _ in step])
        for index, (op, history) in enumerate(step):
            if history:
                text = next(text for text in plain if text[: len(history)] == history)
                plain[text].compare(result.rows(index), len(history), type(op).__name__)
    expert.step([Close(sequence) for sequence in range(SEQUENCES)])


class _Plain:
    """The last rows of a text from a plain request."""

    def __init__(self, engine: VllmEngine, text: tuple[int, ...], numbering: Numbering, architecture: str) -> None:
        """Raises ExpertLoadError when the rows that were read are not those that vLLM samples from."""
        self._architecture = architecture
        self._first = max(0, len(text) - _LAST)
        rows: list[torch.Tensor] = []
        tokens = numbering.to_model(text)
        token = engine.run_plain(tokens, self._first, lambda _, __, row: rows.append(row.double()))
        self._rows = torch.stack(rows)[:, numbering.columns]
        if rows[-1][token] != rows[-1].max():
            raise ExpertLoadError(
                f"model: {architecture} cannot be served by this vLLM: it takes token {token} greedily, whose logit is "
                "not the largest of the row that was read"
            )

    def compare(self, rows: torch.Tensor, length: int, what: str) -> None:
        """`rows`: what a session gave for the last of the first `length` tokens. Raises ExpertLoadError."""
        expected = self._rows[length - rows.shape[0] - self._first : length - self._first]
        spread = torch.linalg.vector_norm(expected - expected.mean(dim=-1, keepdim=True))
        difference = float(torch.linalg.vector_norm(rows.double() - expected) / spread)
        if not difference <= _TOLERANCE[rows.dtype]:
            raise ExpertLoadError(
                f"model: {self._architecture} cannot be served by this vLLM: after {what.lower()} at {length} tokens "
                f"the logits of a session differ from a plain request's by {difference:.2g} of their spread, allowed "
                f"is {_TOLERANCE[rows.dtype]:.2g} for {rows.dtype}"
            )
