"""The byte law by definition: a sum over every tokenization, written without tries or heads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from token_swarm.vocabulary import Vocabulary

TokenLaw = Callable[[tuple[int, ...]], torch.Tensor]


class BruteForce:
    """Marginal next-byte law of one token law after `context`, by enumeration."""

    def __init__(self, vocabulary: Vocabulary, logits: TokenLaw, context: tuple[int, ...]) -> None:
        self._vocabulary = vocabulary
        self._context = context
        allowed = torch.from_numpy(vocabulary.allowed.copy())

        @cache
        def law(tokens: tuple[int, ...]) -> np.ndarray:
            return torch.softmax(torch.where(allowed, logits(tokens), -torch.inf), -1).numpy()

        self._law = law

    def tokenizations(self, text: bytes) -> list[tuple[tuple[int, ...], float]]:
        """(token history, its probability) of every way to write exactly `text`."""
        if not text:
            return [(self._context, 1.0)]
        found = []
        for token, data in enumerate(self._vocabulary.token_bytes):
            if data is not None and text.endswith(data):
                for history, probability in self.tokenizations(text[: len(text) - len(data)]):
                    found.append(((*history, token), probability * float(self._law(history)[token])))
        return found

    def prefix(self, text: bytes) -> float:
        """Probability that a generated text begins with `text`."""
        if not text:
            return 1.0
        total = 0.0
        for cut in range(len(text)):
            rest = text[cut:]
            for history, probability in self.tokenizations(text[:cut]):
                law = self._law(history)
                total += probability * sum(
                    float(law[token])
                    for token, data in enumerate(self._vocabulary.token_bytes)
                    if data is not None and data.startswith(rest)
                )
        return total

    def end(self, text: bytes) -> float:
        """Probability that a generated text is `text` and ends."""
        return sum(
            probability * float(self._law(history)[eos])
            for history, probability in self.tokenizations(text)
            for eos in self._vocabulary.eos_ids
        )

    def next_law(self, text: bytes) -> np.ndarray:
        """float64 [257]: the law of the next symbol after `text`."""
        whole = self.prefix(text)
        law = np.zeros(257)
        for byte in {data[i] for data in self._vocabulary.token_bytes if data for i in range(len(data))}:
            law[byte] = self.prefix(text + bytes((byte,))) / whole
        law[256] = self.end(text) / whole
        return law
