"""KV lanes: which sequences an expert keeps for one text, and how a token history is brought into one of them.

A head only needs its history's KV at the moment of a forward, so a text gets by with one or two sequences per
expert: the lane that shares the longest prefix with the wanted history is cut back to it and extended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from token_swarm.experts.contract import Close, Extend, Fork, Op, Open, Rows, Truncate

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Lane:
    """One sequence in an expert's KV and the tokens it holds."""

    sequence: int
    tokens: Tokens


@dataclass
class LanePlan:
    """What one step does: `ops`, and per wanted history the index of the operation that returns its row.

    A history without a lane (None) has to wait for the next step. `drafted`: the index of the operation that returns
    the rows of the draft.
    """

    ops: list[Op]
    rows: list[int | None]
    drafted: int | None = None


class LaneTable:
    """The lanes of one text at one expert; at most `limit` of them."""

    def __init__(self, allocate: Callable[[], int], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit: {limit}, expected at least 1 lane")
        self._allocate = allocate
        self._limit = limit
        self._lanes: list[Lane] = []

    def plan(
        self, histories: Sequence[Tokens], keep: Callable[[], Tokens] = lambda: (), draft: Tokens = ()
    ) -> LanePlan:
        """Operations after which every placed history has returned its logit row, and each token of `draft`, which
        may follow the first of them, as well.

        `keep`: a history that may be extended later, whose KV is better forked than cut away while lanes are free. It
        is asked for only when a lane would be cut.
        Structure comes first (forks see the lanes as they were), forwards last, so that an expert can run all
        forwards of the step as one batch.
        """
        forks: list[Op] = []
        cuts: list[Op] = []
        forwards: list[Op] = []
        placed: list[int | None] = []  # indices in `forwards`
        drafted: int | None = None
        held = {lane: lane.tokens for lane in self._lanes}  # as before this step
        taken: set[Lane] = set()
        for index, tokens in enumerate(histories):
            # The last token is forwarded again when a lane holds all of them: only a forward returns logits.
            source, shared = None, 0
            for lane, kept in held.items():
                common = min(common_prefix(kept, tokens), len(tokens) - 1)
                if common > shared and (lane not in taken or self._has_room):
                    source, shared = lane, common
            if source is None:
                vacant = self._vacant(taken, held, forks)
                if vacant is None:
                    placed.append(None)
                    continue
                lane = vacant
                forwards.append(Open(lane.sequence, tokens))
            else:
                lane, surplus = source, len(held[source]) > shared
                if source in taken or (surplus and self._has_room and common_prefix(held[source], keep()) > shared):
                    lane = Lane(self._allocate(), ())
                    self._lanes.append(lane)
                    forks.append(Fork(source.sequence, lane.sequence))
                if surplus:
                    cuts.append(Truncate(lane.sequence, shared))
                forwards.append(Extend(lane.sequence, tokens[shared:]))
            lane.tokens = tokens
            taken.add(lane)
            placed.append(len(forwards) - 1)
            if draft and index == 0:
                drafted = len(forwards)
                forwards.append(Extend(lane.sequence, draft, Rows.ALL))
                lane.tokens += draft
        structure = forks + cuts
        rows = [None if place is None else place + len(structure) for place in placed]
        return LanePlan(structure + forwards, rows, None if drafted is None else drafted + len(structure))

    def _vacant(self, taken: Collection[Lane], held: dict[Lane, Tokens], ops: list[Op]) -> Lane | None:
        if not self._has_room:
            idle = [lane for lane in self._lanes if lane not in taken]
            if not idle:
                return None
            self._lanes.remove(idle[0])
            held.pop(idle[0], None)
            ops.append(Close(idle[0].sequence))
        lane = Lane(self._allocate(), ())
        self._lanes.append(lane)
        return lane

    @property
    def _has_room(self) -> bool:
        return len(self._lanes) < self._limit

    def forget_all(self) -> None:
        """The expert has lost every sequence, as after a restart."""
        self._lanes.clear()

    def close(self) -> list[Op]:
        """Operations that free every lane."""
        ops: list[Op] = [Close(lane.sequence) for lane in self._lanes]
        self._lanes.clear()
        return ops


def common_prefix(left: Tokens, right: Tokens) -> int:
    """Number of leading tokens two histories share; slices compare at C speed, so bisect over them."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    same, different = 0, length
    while same < different - 1:
        middle = (same + different) // 2
        if left[:middle] == right[:middle]:
            same = middle
        else:
            different = middle
    return same
