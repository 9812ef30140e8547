"""Experts whose law can be enumerated: the ground truth that mixing and decoding are tested against."""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from token_swarm.experts.contract import (
    Close,
    EncodedPrompt,
    ExpertSpec,
    ExpertStats,
    Extend,
    Fork,
    Op,
    Open,
    OpError,
    Rows,
    StepResult,
    Truncate,
)
from token_swarm.experts.ops import refusal
from token_swarm.vocabulary import Vocabulary

END = 256
"""Index of the end of the text in a next-byte law."""

TextLaw: TypeAlias = Callable[[bytes], np.ndarray]
"""Text so far -> float64 [257]: probabilities of the 256 bytes and, at `END`, of the end of the text."""


class _TokenListExpert(ABC):
    """An expert whose KV is the list of tokens itself."""

    def __init__(self, name: str, vocabulary: Vocabulary, max_sequences: int, max_context: int) -> None:
        silent = [token for token, entry in enumerate(vocabulary.token_bytes) if entry is None]
        marks = [token for token in silent if token not in vocabulary.eos_ids]
        self._mark = marks[0] if marks else None
        self._start = (marks + list(vocabulary.eos_ids) + [None])[0]
        self._ids: dict[bytes, list[int]] = {}
        for token, entry in enumerate(vocabulary.token_bytes):
            if entry is not None:
                self._ids.setdefault(entry, []).append(token)
        self._longest = max(map(len, self._ids))
        self._held: dict[int, tuple[int, ...]] = {}
        self._spec = ExpertSpec(
            name=name,
            architecture="toy",
            vocabulary=vocabulary,
            canonical=hashlib.sha256(b"greedy longest match").hexdigest(),
            max_context=max_context,
            max_sequences=max_sequences,
            dtype=torch.float64,
            has_chat_template=self._mark is not None,
        )

    @property
    def spec(self) -> ExpertSpec:
        """Constant facts about the expert."""
        return self._spec

    @abstractmethod
    def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Next-token logits after `tokens`: float64 [width]."""

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """The first id that neither writes bytes nor ends the text opens the prompt and closes a chat turn.

        Raises ValueError when `prompt` cannot be written in the vocabulary, or is empty and no token can
        stand at the start.
        """
        mark = () if self._mark is None else (self._mark,)
        tokens = (*mark, *self.tokenize(prompt), *(mark if chat else ()))
        if not tokens:
            if self._start is None:
                raise ValueError(f"prompt: empty, and {self._spec.name} has no token to start a text with")
            tokens = (self._start,)
        return EncodedPrompt(tokens, len(self._spec.vocabulary.text(tokens[-1:])))

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Greedy longest match, the lowest id first. Raises ValueError where no token matches."""
        data = text.encode()
        tokens: list[int] = []
        at = 0
        while at < len(data):
            for size in range(min(self._longest, len(data) - at), 0, -1):
                ids = self._ids.get(data[at : at + size])
                if ids is not None:
                    tokens.append(ids[0])
                    at += size
                    break
            else:
                byte = data[at : at + 1]
                raise ValueError(f"text: no token of {self._spec.name} writes {byte!r}, its byte {at}")
        return tuple(tokens)

    def step(self, ops: Sequence[Op]) -> StepResult:
        """Apply `ops` one by one."""
        rows: list[torch.Tensor] = []
        spans: list[tuple[int, int]] = []
        errors: list[OpError | None] = []
        for op in ops:
            lengths = {sequence: len(tokens) for sequence, tokens in self._held.items()}
            errors.append(refusal(op, lengths, self._spec))
            start = len(rows)
            if errors[-1] is None:
                rows.extend(self._apply(op))
            spans.append((start, len(rows)))
        width = self._spec.vocabulary.width
        logits = torch.stack(rows) if rows else torch.empty(0, width, dtype=torch.float64)
        return StepResult(logits, tuple(spans), tuple(errors))

    def stats(self) -> ExpertStats:
        """See `Expert.stats`."""
        tokens = sum(map(len, self._held.values()))
        return ExpertStats(len(self._held), tokens, self._spec.max_sequences * self._spec.max_context)

    def close(self) -> None:
        """Forget every sequence."""
        self._held.clear()

    def _apply(self, op: Op) -> list[torch.Tensor]:
        match op:
            case Open(sequence, tokens, rows) | Extend(sequence, tokens, rows):
                before = self._held.get(sequence, ())
                held = self._held[sequence] = before + tokens
                first = {Rows.NONE: len(held), Rows.LAST: len(held) - 1, Rows.ALL: len(before)}[rows]
                return [self.law(held[: end + 1]) for end in range(first, len(held))]
            case Fork(sequence, new):
                self._held[new] = self._held[sequence]
            case Truncate(sequence, length):
                self._held[sequence] = self._held[sequence][:length]
            case Close(sequence):
                self._held.pop(sequence, None)
        return []


class ToyExpert(_TokenListExpert):
    """Pseudo-random logits, a function of the last `order` tokens of the context (None: of all of them).

    Logits are normal with standard deviation `sharpness`, the same on every machine for the same `seed`.
    Ids without bytes get logits like any other, as in a real model, so that a missing mask shows.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        *,
        seed: int = 0,
        order: int | None = None,
        sharpness: float = 1.0,
        max_sequences: int = 16,
        max_context: int = 2048,
    ) -> None:
        super().__init__(name, vocabulary, max_sequences, max_context)
        self._seed, self._order, self._sharpness = seed, order, sharpness

    def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Next-token logits after `tokens`: float64 [width]."""
        context = tokens if self._order is None else tokens[len(tokens) - min(self._order, len(tokens)) :]
        noise = _generator(self._seed, struct.pack(f"<{len(context)}q", *context))
        return torch.from_numpy(self._sharpness * noise.standard_normal(self._spec.vocabulary.width))


class TextLawExpert(_TokenListExpert):
    """An expert whose law over *text* is `text_law`, whatever its tokenizer.

    Think of the text as drawn byte by byte from the text law f, and of a tokenizer that reads it with one
    symbol of look-ahead: holding the unfinished token u and seeing the next symbol b (a byte or the end), it
    ends u when u·b is no token, and otherwise ends it with probability s(u) and goes on to u·b with 1 - s(u).
    Any vocabulary that holds every prefix of its tokens can be read so, and marginalising this joint law over
    the tokenizations leaves f: the tokenizer never changes the text. With

        g_u(b) = 1 if u·b is no token (always so for the end), else s(u)
        Z_u(x) = sum over b of f(b | x) g_u(b)         (the probability that u ends at x)

    the law of the next token v = b1…bk after text x whose last token is u is

        P(v | …u) = f(b1 | x) g_u(b1) / Z_u(x) · Z_v(x·v)
                    · prod_{i=2..k} f(bi | x b1…b(i-1)) (1 - s(b1…b(i-1)))
        P(end | …u) = f(end | x) / Z_u(x)

    After a token without bytes (the start of the text, the end of a chat turn) g = 1. Hence the byte law
    after `encode("")` or `encode(prompt, chat=True)` is exactly f; after a plain prompt it is f given that
    the prompt's tokens ended where they did. Different heads of one text disagree, and only their posterior
    mixture is f. When every token that has longer tokens has one for every byte f allows, and f never ends
    there, g cancels and the law is f after every token.

    Ids with the same bytes, and several end-of-text ids, share their probability equally. Other ids get
    logit 0: the contract masks them. Raises ValueError when a prefix of a token is no token.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        text_law: TextLaw,
        *,
        seed: int = 0,
        max_sequences: int = 16,
        max_context: int = 2048,
    ) -> None:
        super().__init__(name, vocabulary, max_sequences, max_context)
        self._text_law = text_law
        self._children: dict[bytes, list[int]] = {b"": []}
        for text in self._ids:
            if text[:-1] and text[:-1] not in self._ids:
                message = f"vocabulary: {text!r} is a token, so its prefix {text[:-1]!r} must be one too"
                raise ValueError(message)
            self._children.setdefault(text[:-1], []).append(text[-1])
        self._ends = {text: float(_generator(seed, text).uniform(0.2, 0.8)) for text in self._ids}

    def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Next-token log-probabilities after `tokens`: float64 [width]."""
        vocabulary = self._spec.vocabulary
        text = vocabulary.text(tokens)
        last = vocabulary.token_bytes[tokens[-1]] if tokens else None
        first = self._next_byte(text) * (1.0 if last is None else self._survives(last))
        first = first / first.sum()
        probabilities = np.ones(vocabulary.width)
        for eos in vocabulary.eos_ids:
            probabilities[eos] = first[END] / len(vocabulary.eos_ids)
        self._descend(b"", first, 1.0, text, probabilities)
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(probabilities))

    def _descend(self, node: bytes, law: np.ndarray, reach: float, text: bytes, out: np.ndarray) -> None:
        for byte in self._children.get(node, ()):
            child = node + bytes((byte,))
            arrive = reach * float(law[byte])
            below = self._next_byte(text + child)
            ids = self._ids[child]
            out[ids] = arrive * float(below @ self._survives(child)) / len(ids)
            self._descend(child, below, arrive * (1.0 - self._ends[child]), text, out)

    def _survives(self, token: bytes) -> np.ndarray:
        """g of `token`, float64 [257]: the probability that it ends before each symbol."""
        ends = np.ones(END + 1)
        ends[self._children.get(token, [])] = self._ends[token]
        return ends

    def _next_byte(self, text: bytes) -> np.ndarray:
        law = np.asarray(self._text_law(text), dtype=np.float64)  # [257]
        stray = set(np.flatnonzero(law[:END]).tolist()) - set(self._children[b""])
        if stray:
            byte = bytes((min(stray),))
            raise ValueError(f"text_law: {byte!r} is possible after {text!r}, but no token starts with it")
        if law[END] > 0 and not self._spec.vocabulary.eos_ids:
            raise ValueError("text_law: the text can end, but the vocabulary has no end-of-text id")
        return law


def random_text_law(alphabet: bytes, *, seed: int = 0, order: int = 2, end: float = 0.05) -> TextLaw:
    """A pseudo-random next-byte law over `alphabet` that looks at the last `order` bytes.

    `end` is the probability that a text ends at any point.
    """
    letters = list(alphabet)
    known: dict[bytes, np.ndarray] = {}

    def law(text: bytes) -> np.ndarray:
        context = text[len(text) - min(order, len(text)) :]
        if context not in known:
            weights = np.exp(1.5 * _generator(seed, context).standard_normal(len(letters)))
            probabilities = np.zeros(END + 1)
            probabilities[letters] = (1.0 - end) * weights / weights.sum()
            probabilities[END] = end
            known[context] = probabilities
        return known[context]

    return law


def _generator(seed: int, data: bytes) -> np.random.Generator:
    digest = hashlib.blake2b(data, digest_size=16, key=struct.pack("<q", seed)).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
