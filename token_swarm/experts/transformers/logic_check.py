"""The check at load of what packed steps compute: on a small copy of the model, in float32, beyond every threshold."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.transformers.packed_attention import Run
from token_swarm.experts.transformers.packed_model import pack, packed_forward
from token_swarm.experts.transformers.shadow import VOCABULARY, ShadowError, shadow_model, thresholds
from token_swarm.experts.transformers.slot_cache import SlotCache

logger = logging.getLogger(__name__)

_WITHIN, _BEYOND = 12, 1 << 14
"""What a threshold is set to so that the texts pass it, and so that they do not."""
_LENGTHS = (40, 9, 30)
"""Tokens of the texts: the short one must not see that its neighbours are beyond a threshold."""
_STEPS = (
    ((0, 0, 14), (1, 0, 3)),
    ((0, 14, 15), (1, 3, 4)),
    ((0, 13, 16), (1, 4, 9)),  # three tokens again, as after a rollback
    ((0, 16, 25), (2, 0, 30)),
    ((0, 25, 40), (1, 8, 9)),
)
"""Forwards: of each text that takes part its number and the tokens from where to where."""
_ROUNDING = 1e-3
"""Largest difference, as a share of a row's spread, that float32 explains in a model of few layers."""


def check_logic(model: Any, context: int, least: int) -> int:
    """How many tokens a sequence of `model` may have in packed batches: `context`, or fewer.

    Fewer where the model computes in another way from a threshold on, which packed batches do not follow: the
    context then ends below it, and a warning says so. Raises ExpertLoadError when not even `least` are left, or when
    packed batches are wrong from the first token on.
    """
    real = thresholds(model.config)
    near = [name for name, value in real.items() if value < context]
    off = dict.fromkeys(real, _BEYOND)
    name = type(model).__name__
    try:
        if near and not _difference(model, off | dict.fromkeys(near, _WITHIN)):
            return context
        if reason := _difference(model, off):
            raise ExpertLoadError(f"model: {name} cannot be served in packed batches: {reason}")
        if not near:
            return context
        wrong = [each for each in near if _difference(model, off | {each: _WITHIN})] or near
    except ShadowError as error:
        reason = " ".join(str(error).split())
        logger.warning("%s is checked on a short text alone: no small copy of it can be made (%s)", name, reason)
        return context
    first = min(wrong, key=lambda each: real[each])
    limit = real[first] - 1
    if limit < least:
        raise ExpertLoadError(
            f"model: {name} cannot be served in packed batches: from {first.split('.')[-1]} = {real[first]} tokens on "
            "they do not compute what it does"
        )
    logger.warning(
        "max_context: lowered from %d to %d: from %s = %d tokens on, %s computes in a way that packed batches do not "
        "follow", context, limit, first.split(".")[-1], real[first], name,
    )  # fmt: skip
    return limit


def _difference(model: Any, limits: Mapping[str, int]) -> str:
    """What packed batches of a small copy do wrong, in words; empty when they do what the copy does."""
    plain = shadow_model(model, limits)
    texts = [torch.arange(length) * (17 + 2 * number) % VOCABULARY for number, length in enumerate(_LENGTHS)]
    with torch.inference_mode():
        expected = [_plain_rows(plain, text) for text in texts]
        if not limits or min(limits.values()) == _BEYOND:
            half = len(texts[0]) // 2
            if (off := _off(_plain_rows(plain, texts[0][:half]), expected[0][:half])) > _ROUNDING:
                return f"its logits depend on tokens that come later, by {off:.2g} of their spread: it is not causal"
        packed = copy.deepcopy(plain)
        cache = SlotCache(len(texts), max(_LENGTHS))
        try:
            pack(packed)
            for step in _STEPS:
                runs: list[Run] = []
                tokens: list[int] = []
                for number, start, stop in step:
                    runs.append(Run(number, start, stop - start, len(tokens)))
                    tokens += texts[number][start:stop].tolist()
                rows = packed_forward(packed, cache, runs, tokens, range(len(tokens)))
                for run in runs:
                    off = _off(rows[run.row : run.row + run.count], expected[run.slot][run.start : run.stop])
                    if not off <= _ROUNDING:
                        return f"logits differ from a plain forward by {off:.2g} of their spread"
        except (TypeError, RuntimeError, LookupError, AttributeError, ValueError) as error:
            return " ".join(str(error).split()) or type(error).__name__
    return ""


def _plain_rows(model: Any, text: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = model(input_ids=text[None], use_cache=False).logits[0]
    return rows


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a row, as a share of that row's spread."""
    spread = torch.linalg.vector_norm(expected - expected.mean(dim=-1, keepdim=True), dim=-1)
    return float((torch.linalg.vector_norm(found - expected, dim=-1) / spread).max())
