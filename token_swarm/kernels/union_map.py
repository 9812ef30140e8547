"""The union of several vocabularies: which of each expert's tokens write the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        """The union of `vocabularies`, one per expert, in that order. Linear in their total size."""
        owned: dict[bytes | None, list[list[int]]] = {}
        for expert, vocabulary in enumerate(vocabularies):
            entries: list[tuple[bytes | None, int]] = [
                (data, token) for token, data in enumerate(vocabulary.token_bytes) if data is not None
            ]
            entries += [(None, token) for token in vocabulary.eos_ids]
            for data, token in entries:
                owned.setdefault(data, [[] for _ in vocabularies])[expert].append(token)
        patterns = {data: tuple(e for e, ids in enumerate(owners) if ids) for data, owners in owned.items()}
        ordered = sorted(owned, key=lambda data: (data is None, patterns[data], data or b""))
        first = [[owned[data][e][0] if owned[data][e] else -1 for data in ordered] for e in range(len(vocabularies))]
        twins = [
            (expert, token, twin)
            for token, data in enumerate(ordered)
            for expert, ids in enumerate(owned[data])
            for twin in ids[1:]
        ]
        segments: list[Segment] = []
        for token, data in enumerate(ordered):
            if segments and segments[-1].experts == patterns[data]:
                segments[-1] = Segment(segments[-1].low, token + 1, patterns[data])
            else:
                segments.append(Segment(token, token + 1, patterns[data]))
        return cls(
            texts=tuple(ordered),
            ids=torch.tensor(first, dtype=torch.int32),
            twins=torch.tensor(twins, dtype=torch.int32).reshape(-1, 3),
            segments=tuple(segments),
        )

    def pairs(self, expert: int) -> tuple[Tensor, Tensor]:
        """(union tokens, ids of `expert`), one pair for every id that takes part: int64 [ids] each."""
        own = self.ids[expert].long()
        twins = self.twins[self.twins[:, 0] == expert].long()
        covered = (own >= 0).nonzero()[:, 0]
        return torch.cat([covered, twins[:, 1]]), torch.cat([own[covered], twins[:, 2]])
