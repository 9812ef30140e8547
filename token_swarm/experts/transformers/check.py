"""The check at load of the model itself: packed steps must give its plain forward's logits up to its own rounding."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from token_swarm.experts.contract import Close, Expert, ExpertSpec, Extend, Fork, Op, Open, Rows, Truncate
from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.experts.tokenizer.prompt import PromptEncoder
from token_swarm.experts.transformers.loading import cache_argument

SEQUENCES = 3
"""Sequences that the check opens."""

CONTEXT = 16
"""Shortest context that the check can work in."""

_TOKENS = 40
"""Of the longest text: windows and other thresholds are passed in a small copy of the model (`logic_check`)."""

_TEXTS = (
    "The harbour was quiet before the storm of 1987 reached it. Fishermen had tied up 23 boats along the stone pier, "
    "and the keeper of the lighthouse wrote down the time, 4:45, in a book that nobody would open again for 30 years. "
    "Most of what he saw that night is known from two letters to his sister, who lived inland.",
    "To sort a list in place, call its method of that name; it returns nothing.",
    "In spring, however, the river rises again, and the lower meadows lie under water for weeks.",
)
"""What a language model expects. Models amplify rounding on random tokens, and without the token that begins a text."""

_FLOORS = 3.0
"""A difference of up to so many times the model's own is taken for rounding."""

_LEAST = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Differences, as shares of the spread, that are rounding in any model: its own may happen to be 0, and on a CPU its
layers are replaced by kernels that sum in another order."""


class NotFinite(ExpertLoadError):
    """The plain model's logits overflow in its dtype."""


class RoundingDiffers(ExpertLoadError):
    """Packed steps differ from the plain model by more than its rounding explains."""


class PlainForward:
    """Three texts and their logits, from a plain forward of `model`; and how far it differs from itself.

    `floor`: the difference between texts fed in pieces through the model's own cache and at once, as a share of the
    spread of the logits; 0 until it is measured. In float32 it is below what is allowed in any case (1e-6 measured),
    so there it is measured only where packed steps seem to differ: it takes as long as the rest of the check.
    """

    def __init__(self, model: Any, spec: ExpertSpec, numbering: Numbering, prompts: PromptEncoder) -> None:
        """Raises NotFinite when the model's logits are not finite on ordinary text."""
        size = min(_TOKENS, spec.max_context)
        long, short, other = (_tokens(prompts, text, size) for text in _TEXTS)
        self.long, self.short = long, short[:8]
        self.branch = long[: size // 2 - 2] + other[1:6]
        self._dtype, self._numbering = spec.dtype, numbering
        # What stands behind a text's end does not change its rows: the model is causal.
        texts = (self.long, self.short, self.branch)
        table = [numbering.to_model(text + text[-1:] * (size - len(text))) for text in texts]
        with torch.inference_mode():
            whole = model(input_ids=torch.tensor(table, device=model.device), use_cache=False).logits
        if not torch.isfinite(whole).all():
            raise NotFinite(
                f"model: {spec.architecture} has logits that are not finite in {_name(spec.dtype)} on ordinary text; "
                "use dtype: float32 or bfloat16"
            )
        self._rows = {text: rows[: len(text), numbering.columns].cpu() for text, rows in zip(texts, whole, strict=True)}
        self.floor = 0.0
        self.measured = False
        if spec.dtype != torch.float32:
            self.measure_floor(model)

    def measure_floor(self, model: Any) -> None:
        """Set `floor`; `model` is the plain one."""
        half, shared = len(self.long) // 2, len(self.branch) - 5
        pieces = {
            self.long: (half, 1, len(self.long) - half - 1),
            self.short: (2, 1, 5),
            self.branch: (shared, 5),
        }
        with torch.inference_mode():
            for text, counts in pieces.items():
                inputs = torch.tensor([self._numbering.to_model(text)], device=model.device)
                rows = _in_pieces(model, inputs, counts)[:, self._numbering.columns].cpu()
                self.floor = max(self.floor, _difference(rows, self._rows[text]))
        self.measured = True

    @property
    def tolerance(self) -> float:
        """Largest difference, as a share of the spread, that rounding explains."""
        return max(_FLOORS * self.floor, _LEAST[self._dtype])

    def compare(self, expert: Expert) -> float:
        """Feed the texts to `expert`, which has no open sequences, in pieces; returns the largest difference.

        Covers a ragged batch, chunks, single tokens, a rollback and a fork. Raises RoundingDiffers.
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
        largest = 0.0
        for step in steps:
            result = expert.step([op for op, _ in step])
            for index, (op, history) in enumerate(step):
                if not history:
                    continue
                rows = result.rows(index)
                text = next(text for text in self._rows if text[: len(history)] == history)
                off = _difference(rows, self._rows[text][len(history) - rows.shape[0] : len(history)])
                if not off <= self.tolerance:
                    raise RoundingDiffers(
                        f"model: {expert.spec.architecture} cannot be served in packed batches: after "
                        f"{type(op).__name__.lower()} its logits differ from a plain forward by {off:.2g} of their "
                        f"spread, {self.tolerance:.2g} is what rounding in {_name(expert.spec.dtype)} explains"
                    )
                largest = max(largest, off)
        expert.step([Close(sequence) for sequence in range(SEQUENCES)])
        return largest


def _tokens(prompts: PromptEncoder, text: str, size: int) -> tuple[int, ...]:
    """`size` tokens that begin as a prompt does; a text of fewer is repeated."""
    tokens = prompts.encode(text, chat=False).tokens
    return tuple(itertools.islice(itertools.cycle(tokens), size))


def _in_pieces(model: Any, inputs: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Logits of `inputs`, [1, tokens], fed in pieces through a cache of the model's own: [tokens, width]."""
    cache, rows, name = None, [], cache_argument(model)
    for piece in torch.split(inputs, list(counts), dim=1):
        output = model(input_ids=piece, use_cache=True, **{name: cache})
        cache = output[name]
        rows.append(output.logits[0])
    return torch.cat(rows)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the spread of the expected logits; NaN is no number that a tolerance admits."""
    expected = expected.double()
    spread = torch.linalg.vector_norm(expected - expected.mean(dim=-1, keepdim=True))
    return float(torch.linalg.vector_norm(found.double() - expected) / spread)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
