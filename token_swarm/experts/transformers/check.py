"""The check at load: packed steps must give what the model's own plain forward gives.

A model whose code does something the packed batch cannot follow (positions taken from the cache, a bias of its
own, a state beside the KV) is found here, before it can answer anybody.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from token_swarm.experts.contract import Close, Expert, ExpertSpec, Extend, Fork, Op, Open, Rows, Truncate
from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.tokenizer.numbering import Numbering

SEQUENCES = 3
"""Sequences that the check opens."""

CONTEXT = 16
"""Shortest context that the check can work in."""

_LONGEST_WINDOW = 64
"""Windows up to this size are passed in the check: it stays a matter of a second."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference that rounding explains."""


class PlainForward:
    """Three texts and their logits, from plain forwards of `model` without a cache."""

    def __init__(self, model: Any, spec: ExpertSpec, numbering: Numbering) -> None:
        window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
        size = CONTEXT + (window if window <= _LONGEST_WINDOW else 0)
        size = min(size, spec.max_context)
        ids = np.flatnonzero(spec.vocabulary.allowed)
        draw = np.random.default_rng(0).choice(ids, size=2 * size + 8).tolist()
        self.long, self.short = tuple(draw[:size]), tuple(draw[size : size + 8])
        self.branch = self.long[: size // 2 - 2] + tuple(draw[-5:])
        with torch.inference_mode():
            self._rows = {
                text: _rows(model, numbering.to_model(text))[:, numbering.columns]
                for text in (self.long, self.short, self.branch)
            }

    def compare(self, expert: Expert) -> None:
        """Feed the texts to `expert`, which has no open sequences, in pieces, and compare its rows.

        Covers a ragged batch, chunks, single tokens, a rollback, a fork and, when it is small, the sliding
        window. Raises ExpertLoadError when they differ by more than rounding.
        """
        long, short, branch = self.long, self.short, self.branch
        half, shared = len(long) // 2, len(branch) - 5
        wrong = (short[0], short[1], short[2])
        steps: list[list[tuple[Op, tuple[int, ...]]]] = [
            [(Open(0, long[:half], Rows.ALL), long[:half]), (Open(1, short[:2], Rows.ALL), short[:2])],
            [(Extend(1, short[2:3], Rows.ALL), short[:3]), (Extend(0, wrong, Rows.NONE), ())],
            [
                (Truncate(0, half), ()),
                (Extend(0, long[half : half + 1], Rows.ALL), long[: half + 1]),
                (Extend(1, short[3:], Rows.ALL), short),
            ],
            [(Fork(0, 2), ()), (Extend(0, long[half + 1 :], Rows.ALL), long)],
            [(Truncate(2, shared), ()), (Extend(2, branch[shared:], Rows.ALL), branch)],
        ]
        for step in steps:
            result = expert.step([op for op, _ in step])
            for index, (op, history) in enumerate(step):
                if history:
                    self._compare_rows(result.rows(index), history, type(op).__name__, expert.spec)
        expert.step([Close(sequence) for sequence in range(SEQUENCES)])

    def _compare_rows(self, rows: torch.Tensor, history: tuple[int, ...], what: str, spec: ExpertSpec) -> None:
        text = next(text for text in self._rows if text[: len(history)] == history)
        expected = self._rows[text][len(history) - rows.shape[0] : len(history)].double()
        spread = torch.linalg.vector_norm(expected - expected.mean(dim=-1, keepdim=True))
        difference = float(torch.linalg.vector_norm(rows.double() - expected) / spread)
        if not difference <= _TOLERANCE[spec.dtype]:
            raise ExpertLoadError(
                f"model: {spec.architecture} cannot be served in packed batches: after {what.lower()} its logits "
                f"differ from a plain forward by {difference:.2g} of their spread, "
                f"allowed is {_TOLERANCE[spec.dtype]:.2g} for {spec.dtype}"
            )


def _rows(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """Every token's logits, [tokens, width]."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    return logits.cpu()
