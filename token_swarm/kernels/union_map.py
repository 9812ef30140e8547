"""The union of several vocabularies: which of each expert's tokens write the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from token_swarm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Segment:
    """Union tokens [low, high), all of which exactly the experts in `experts` have."""

    low: int
    high: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class UnionMap:
    """Union tokens are the distinct byte strings of all vocabularies and, last, the end of the text.

    They are ordered by coverage pattern (which experts have them), so that a kernel walks whole segments without
    asking token by token. `texts[u]` is what union token u writes, None for the end of the text.
    ids: int32 [experts, size], an id of that expert that writes the token, -1 when it has none.
    twins: int32 [count, 3], (expert, union token, id) of every further id that writes the same bytes, or of every
    further end-of-text id; sorted by union token.
    """

    texts: tuple[bytes | None, ...]
    ids: Tensor
    twins: Tensor
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of union tokens."""
        return len(self.texts)

    @classmethod
    def build(cls, vocabularies: Sequence[Vocabulary]) -> UnionMap:
        """The union of `vocabularies`, one per expert, in that order. A sort apart, linear in their total size."""
        firsts = [_first_ids(vocabulary) for vocabulary in vocabularies]
        owners: dict[bytes | None, int] = {}  # bit e: expert e has it
        for expert, first in enumerate(firsts):
            bit = 1 << expert
            for data in first:
                owners[data] = owners.get(data, 0) | bit
        by_pattern: dict[int, list[bytes]] = {}
        for data, bits in owners.items():
            if data is not None:
                by_pattern.setdefault(bits, []).append(data)
        ordered: list[bytes | None] = []
        segments: list[Segment] = []
        for experts, bits in sorted((_experts_of(bits), bits) for bits in by_pattern):
            segments.append(Segment(len(ordered), len(ordered) + len(by_pattern[bits]), experts))
            ordered.extend(sorted(by_pattern[bits]))
        if None in owners:
            experts = _experts_of(owners[None])
            # The end of the text lengthens the last segment where the same experts have both.
            low = segments.pop().low if segments and segments[-1].experts == experts else len(ordered)
            segments.append(Segment(low, len(ordered) + 1, experts))
            ordered.append(None)
        return cls(
            texts=tuple(ordered),
            ids=torch.from_numpy(
                np.stack(
                    [np.fromiter((first.get(data, -1) for data in ordered), np.int32, len(ordered)) for first in firsts]
                )
            ),
            twins=torch.tensor(_twins(vocabularies, firsts, ordered), dtype=torch.int32).reshape(-1, 3),
            segments=tuple(segments),
        )

    def pairs(self, expert: int) -> tuple[Tensor, Tensor]:
        """(union tokens, ids of `expert`), one pair for every id that takes part: int64 [ids] each."""
        own = self.ids[expert].long()
        twins = self.twins[self.twins[:, 0] == expert].long()
        covered = (own >= 0).nonzero()[:, 0]
        return torch.cat([covered, twins[:, 1]]), torch.cat([own[covered], twins[:, 2]])


def _first_ids(vocabulary: Vocabulary) -> dict[bytes | None, int]:
    """The lowest id that writes each byte string; under None the lowest end-of-text id, if there is one."""
    # Of equal keys the last one given stays, hence backwards. The ids without bytes share the key None.
    last = range(vocabulary.width - 1, -1, -1)
    first: dict[bytes | None, int] = dict(zip(reversed(vocabulary.token_bytes), last, strict=True))
    first.pop(None, None)
    if vocabulary.eos_ids:
        first[None] = vocabulary.eos_ids[0]
    return first


def _experts_of(bits: int) -> tuple[int, ...]:
    return tuple(expert for expert in range(bits.bit_length()) if bits >> expert & 1)


def _twins(
    vocabularies: Sequence[Vocabulary],
    firsts: Sequence[Mapping[bytes | None, int]],
    ordered: Sequence[bytes | None],
) -> list[tuple[int, int, int]]:
    """(expert, union token, id) of every id that is not the first of its bytes, by union token, expert and id."""
    further: list[tuple[int, bytes | None, int]] = []
    for expert, (vocabulary, first) in enumerate(zip(vocabularies, firsts, strict=True)):
        further += [
            (expert, data, token)
            for token, data in enumerate(vocabulary.token_bytes)
            if data is not None and first[data] != token
        ]
        further += [(expert, None, token) for token in vocabulary.eos_ids[1:]]
    wanted = {data for _, data, _ in further}
    place = {data: token for token, data in enumerate(ordered) if data in wanted}
    return sorted(((e, place[data], token) for e, data, token in further), key=lambda twin: (twin[1], twin[0], twin[2]))
