"""Rolling windows over a text that is longer than an expert's context (sans-I/O): which bytes are scored after which.

    text      ├────────────── first ──────────────┼── stride ──┼── stride ──┼─ ...
    window 2                 ├─────── context ────┤xxxxxxxxxxxx│
    window 3                              ├────── context ─────┤xxxxxxxxxxxx│

Every byte is scored once. The first window takes what fits after the prompt; each later one scores `stride` bytes,
after as many bytes before them as an expert's context has room for. Experts with longer contexts read more: up to the
whole text so far and the prompt. A stride as long as the context is what evaluation harnesses call disjoint windows.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from token_swarm.decoding.score import ExpertScore, Score, ScoredWindow, scored_text
from token_swarm.errors import BadParameter, PromptTooLong, TextTooLong
from token_swarm.experts.contract import EncodedPrompt, ExpertSpec

SLACK = 8
"""Tokens that a piece of a text may need beyond those that the whole text has there: it is cut elsewhere."""


@dataclass(frozen=True)
class Window:
    """Bytes [start, stop) of the text. contexts: where in it each expert's context starts, None: at the prompt."""

    start: int
    stop: int
    contexts: Mapping[str, int | None]

    def context_of(self, expert: str, text: bytes) -> str | None:
        """The bytes that `expert` reads before the window; None: the prompt and all of the text before."""
        start = self.contexts[expert]
        return None if start is None else text[start : self.start].decode()

    def shorter(self, expert: str, text: bytes, tokens: int) -> Window:
        """The window with `tokens` tokens too many of context taken off an expert, at a guess of their length."""
        start = self.contexts[expert]
        after = _boundary(text, min(self.start, (start or 0) + 8 * (tokens + 1)), up=True)
        return Window(self.start, self.stop, {**self.contexts, expert: after})


@dataclass(frozen=True)
class ExpertTokens:
    """What an expert's windows are made by. ends: int64, the byte of the text after each of its canonical tokens;
    prompt: tokens of its prompt; limit: tokens of its context."""

    ends: npt.NDArray[np.int64]
    prompt: int
    limit: int

    @property
    def whole(self) -> bool:
        """Whether prompt and text fit together."""
        return self.prompt + len(self.ends) <= self.limit

    def reach(self, start: int, tokens: int) -> int:
        """The byte up to which `tokens` tokens from `start` on go."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        return int(self.ends[min(first + tokens, len(self.ends)) - 1])

    def back(self, stop: int, tokens: int) -> int:
        """The first byte of the `tokens` tokens before `stop`."""
        first = int(np.searchsorted(self.ends, stop - 1, side="right")) - tokens + 1
        return int(self.ends[first - 1]) if first > 0 else 0

    def count(self, stop: int) -> int:
        """Tokens up to the byte `stop`."""
        return int(np.searchsorted(self.ends, stop - 1, side="right")) + 1


def plan_windows(text: bytes, experts: Mapping[str, ExpertTokens], stride: int | None) -> tuple[int, list[Window]]:
    """(stride in bytes, the windows of `text`). A single window has all of it, and the stride is its length.

    stride: None takes half of what the shortest context holds of this text, so that every byte after the first window
    has at least about that much before it. Raises BadParameter for a stride below 1, PromptTooLong when a prompt leaves
    no room.
    """
    if stride is not None and stride < 1:
        raise BadParameter("stride", stride, "at least 1 byte")
    size = len(text)
    if all(own.whole for own in experts.values()):
        return size, [Window(0, size, dict.fromkeys(experts))]
    for name, own in experts.items():
        if own.limit <= 2 * SLACK:
            raise TextTooLong(name, own.prompt + len(own.ends), own.limit)
        if own.prompt >= own.limit:
            raise PromptTooLong(name, own.prompt, own.limit)
        if own.prompt >= own.limit - SLACK:
            allowed = f"at most {own.limit - SLACK - 1}, as the text outgrows its context of {own.limit} tokens"
            raise BadParameter("prompt", f"{own.prompt} tokens of expert {name}", allowed)
    # A piece is read after the token that texts start with.
    room = {name: own.limit - SLACK - 1 for name, own in experts.items()}
    if stride is None:
        stride = max(1, min(room[name] * size // (2 * len(own.ends)) for name, own in experts.items()))
    fits = min(own.reach(0, own.limit - own.prompt - SLACK) for own in experts.values())
    stops = [0, _boundary(text, fits)]
    while stops[-1] < size:
        start = stops[-1]
        furthest = min(own.reach(start, room[name] - 1) for name, own in experts.items())
        stop = _boundary(text, min(size, start + stride, furthest))
        stops.append(stop if stop > start else _boundary(text, start + 1, up=True))
    windows = [Window(0, stops[1], dict.fromkeys(experts))]
    for start, stop in pairwise(stops[1:]):
        contexts = {}
        for name, own in experts.items():
            all_fits = own.prompt + own.count(stop) + SLACK <= own.limit
            contexts[name] = None if all_fits else min(start, _boundary(text, own.back(stop, room[name]), up=True))
        windows.append(Window(start, stop, contexts))
    return stride, windows


def token_lengths(spec: ExpertSpec, prompt: EncodedPrompt, text: str, tokens: Sequence[int]) -> ExpertTokens:
    """What the windows of an expert are made by. tokens: canonical, of what `scored_text` says."""
    context, whole = scored_text(spec, prompt, text)
    lengths = np.asarray([len(spec.vocabulary.token_bytes[token] or b"") for token in tokens], dtype=np.int64)
    # The first tokens may write the end of the prompt again.
    ends = np.maximum(np.cumsum(lengths) - (len(whole.encode()) - len(text.encode())), 0)
    return ExpertTokens(ends, len(context), spec.max_context)


@dataclass(frozen=True)
class Ask:
    """A text that an expert is to encode: as a prompt, or to tokenize it."""

    text: str
    as_prompt: bool


def encode_window(
    spec: ExpertSpec, prompt: EncodedPrompt, text: bytes, window: Window
) -> Generator[Ask, Any, tuple[EncodedPrompt, tuple[int, ...]]]:
    """Asks for what it takes to know an expert's (context of a window as a prompt, canonical tokens to score).

    Answers are sent: what `Expert.encode` or `Expert.tokenize` says.
    """
    own = text[window.start : window.stop].decode()
    while True:
        before = window.context_of(spec.name, text)
        if before is not None:
            encoded: EncodedPrompt = yield Ask(before, as_prompt=True)
        elif window.start:
            context, whole = scored_text(spec, prompt, text[: window.start].decode())
            tokens = (*context, *(yield Ask(whole, as_prompt=False)))
            encoded = EncodedPrompt(tokens, len(spec.vocabulary.token_bytes[tokens[-1]] or b""))
        else:
            encoded = prompt
        context, whole = scored_text(spec, encoded, own)
        tokens = yield Ask(whole, as_prompt=False)
        excess = len(context) + len(tokens) - spec.max_context
        shortest = before == "" or not window.start
        if excess <= 0 or shortest:
            return encoded, tokens
        # Cut elsewhere, the text has more tokens than it had as a whole.
        window = window.shorter(spec.name, text, excess)


def join_scores(stride: int, windows: Sequence[Window], scores: Sequence[Score]) -> Score:
    """The score of the whole text."""
    experts = {
        name: ExpertScore(
            sum(score.experts[name].tokens for score in scores),
            sum(score.experts[name].token_log_prob for score in scores),
            [nats for score in scores for nats in score.experts[name].per_byte],
        )
        for name in scores[0].experts
    }
    shown = [
        ScoredWindow(own.start, own.stop - own.start, min(own.start - (begin or 0) for begin in own.contexts.values()))
        for own in windows
    ]
    per_byte = [nats for score in scores for nats in score.per_byte]
    return Score(len(per_byte), experts, per_byte, max(score.retired for score in scores), stride, shown)


def _boundary(text: bytes, at: int, *, up: bool = False) -> int:
    """`at`, or the nearest byte before it (after it) at which a character starts."""
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1 if up else -1
    return at
