"""The union law by definition, without a map, tries or kernels; and union units to compare with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.contract import Expert
from token_swarm.kernels import UnionMap
from token_swarm.mixing.groups import Unit, make_rows
from token_swarm.mixing.union_unit import DEFAULT_FLOOR, UnionUnit
from token_swarm.particle import Mixture, Rule

UNION = DecodeRequest(unit=Unit.UNION)
WEIGHTS = {"e0": 0.6, "e1": 0.4}
Histories = tuple[tuple[int, ...], ...]
Law = dict[bytes | None, float]


def segmentations(words: Sequence[bytes], data: bytes) -> list[tuple[bytes, ...]]:
    """Every way to write `data` in `words`."""
    if not data:
        return [()]
    return [
        (word, *rest)
        for word in sorted(set(words))
        if data.startswith(word)
        for rest in segmentations(words, data[len(word) :])
    ]


def lengths(split: Sequence[bytes]) -> list[int]:
    return [len(word) for word in split]


class Definition:
    """The union law and its histories, written without a map, tries or kernels."""

    def __init__(self, experts: Mapping[str, Expert], mixture: Mixture, floor: float = DEFAULT_FLOOR) -> None:
        self._experts = [experts[name] for name in mixture.weights]
        self._weights = list(mixture.weights.values())
        self._heats = [mixture.temperatures.get(name, 1.0) for name in mixture.weights]
        self._rule = mixture.rule
        self._floor = floor

    def own(self, expert: int, tokens: tuple[int, ...]) -> Law:
        """An expert's law over byte strings."""
        vocabulary = self._experts[expert].spec.vocabulary
        logits = self._experts[expert].law(tokens) / self._heats[expert]  # type: ignore[attr-defined]
        row = torch.softmax(torch.where(torch.from_numpy(vocabulary.allowed.copy()), logits, -torch.inf), -1)
        law: Law = {}
        for token in np.flatnonzero(vocabulary.allowed).tolist():
            data = vocabulary.token_bytes[token]
            law[data] = law.get(data, 0.0) + float(row[token])
        return law

    def law(self, histories: Histories) -> Law:
        laws = [self.own(expert, tokens) for expert, tokens in enumerate(histories)]
        mixed: Law = {}
        for data in {data for law in laws for data in law}:
            given = [law.get(data, 0.0) for law in laws]
            if self._rule is Rule.LINEAR:
                mixed[data] = sum(w * p for w, p in zip(self._weights, given, strict=True))
            else:
                logs = [max(self._floor, math.log(p) if p else -math.inf) for p in given]
                mixed[data] = math.exp(sum(w * log for w, log in zip(self._weights, logs, strict=True)))
        total = sum(mixed.values())
        return {data: value / total for data, value in mixed.items()}

    def append(self, histories: Histories, data: bytes) -> Histories:
        """Every history after one more union token, which all experts here can write."""
        longer = []
        for expert, tokens in zip(self._experts, histories, strict=True):
            vocabulary = expert.spec.vocabulary
            words = [word for word in vocabulary.token_bytes if word is not None]
            row = expert.law(tokens)  # type: ignore[attr-defined]
            for word in max(segmentations(words, data), key=lengths):
                ids = [token for token, own in enumerate(vocabulary.token_bytes) if own == word]
                tokens = (*tokens, max(ids, key=lambda token: (float(row[token]), -token)))
            longer.append(tokens)
        return tuple(longer)

    def start(self, prompt: str) -> Histories:
        return tuple(expert.encode(prompt).tokens for expert in self._experts)


def union_unit(local: LocalEnsemble, mixture: Mixture, prompt: str = "", request: DecodeRequest = UNION) -> UnionUnit:
    """A union unit, even of a single expert."""
    rows = make_rows(local.ensemble.specs, mixture)
    return local.ensemble.union_unit(rows, request, local.encode(mixture, prompt))


def texts_of(unit: UnionUnit) -> tuple[bytes | None, ...]:
    return UnionMap.build([group.vocabulary for group in unit.groups]).texts


def by_text(unit: UnionUnit) -> Law:
    return dict(zip(texts_of(unit), unit.law().tolist(), strict=True))
