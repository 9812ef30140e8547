"""Turns "these histories need a forward" into operations per expert, and logit rows back into the unit.

This is the sans-I/O seam: `calls` says what to run, `resume` takes what came back. The same code runs in one
process, in the server, and against toy experts in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor

from token_swarm.decoding.drafts import PromptLookup
from token_swarm.decoding.lanes import LaneTable, Tokens
from token_swarm.errors import BadLogits, ExpertFault
from token_swarm.experts.contract import Op, OpError, OpErrorKind
from token_swarm.mixing.stopwatch import Stopwatch
from token_swarm.mixing.unit import MixingUnit, Need

History: TypeAlias = tuple[int, Tokens]
"""A group and tokens of its vocabulary."""

Outcome = Tensor | OpError
"""What one operation gave: its logit rows [n, width] (n may be 0), or why it was refused."""

Calls = dict[str, list[Op]]
"""Operations by expert name, to be run as one step per expert, all experts at the same time."""

MAX_RECOVERIES = 3
"""How often in a row an expert may say that it does not have a sequence."""


class ContextFull(Exception):
    """A history no longer fits an expert's context."""


@dataclass(slots=True)
class _Wanted:
    """rows: by expert, as they come back. made: of complete rows, before all experts had answered."""

    need: Need
    rows: dict[str, Tensor]
    made: object | None = None

    @property
    def history(self) -> History:
        """What the rows come after."""
        return self.need.group, self.need.tokens


@dataclass(frozen=True, slots=True)
class _Placed:
    """Operations of one expert's step: `wanted` and where its row is, `draft` and where the rows of its tokens are."""

    wanted: list[tuple[_Wanted, int]]
    draft: Tokens
    drafted: int | None


def _make(works: Sequence[tuple[_Wanted, Callable[[], object]]]) -> None:
    for wanted, work in works:
        # `resume` meets the same rows, and is where an expert is blamed.
        with suppress(BadLogits):
            wanted.made = work()


class Forwards:
    """The forwards of one text: lanes per expert, rows that have come back, and counts."""

    def __init__(self, unit: MixingUnit, allocate: Callable[[str], int], lanes_per_expert: int) -> None:
        self._unit = unit
        self._lanes_per_expert = lanes_per_expert
        self._lanes: dict[str, LaneTable] = {}
        self._limits: dict[str, int] = {}
        for group in unit.groups:
            for spec in group.experts:
                name = spec.name
                self._lanes[name] = LaneTable(lambda name=name: allocate(name), lanes_per_expert)  # type: ignore[misc]
                self._limits[name] = spec.max_context
        self._lookups = [PromptLookup() for _ in unit.groups]
        self._wanted: list[_Wanted] = []
        self._rows: dict[History, dict[str, Tensor]] = {}  # that have come back and were not fed
        self._drafts: set[History] = set()  # of those, and of earlier ones
        self._placed: dict[str, _Placed] = {}
        self._recoveries = 0
        self.histories: list[set[Tokens]] = [set() for _ in unit.groups]
        """Per group: the histories that were forwarded."""
        self.drafted = [0 for _ in unit.groups]
        """Per group: of those, the ones that were drafted."""
        self.accepted = [0 for _ in unit.groups]
        """Per group: of those, the ones that the text needed afterwards."""

    def calls(self, needs: Sequence[Need], drafts: int = 0) -> Calls:
        """What must run before the unit has a law, which `needs` says; empty when it has one. Raises ContextFull.

        drafts: most tokens that each group may have forwarded beyond what it needs.
        """
        needed = {(need.group, need.tokens) for need in needs}
        self._rows = {key: rows for key, rows in self._rows.items() if key in needed or self._may_come(key)}
        self._wanted = [
            _Wanted(need, self._rows.setdefault((need.group, need.tokens), {})) for need in self._of_one_step(needs)
        ]
        drafted = self._draft(drafts) if drafts else {}
        calls: Calls = {}
        self._placed = {}
        for name, table in self._lanes.items():
            waiting = [wanted for wanted in self._wanted if self._is_member(name, wanted) and name not in wanted.rows]
            if not waiting:
                continue
            for wanted in waiting:
                if len(wanted.need.tokens) > self._limits[name]:
                    raise ContextFull
            first = waiting[0]
            keep = partial(self._unit.history, first.need.group)
            draft = drafted.get(first.history, ())
            plan = table.plan([wanted.need.tokens for wanted in waiting], keep, draft)
            calls[name] = plan.ops
            placed = [(wanted, index) for wanted, index in zip(waiting, plan.rows, strict=True) if index is not None]
            self._placed[name] = _Placed(placed, draft, plan.drafted)
        return calls

    def _of_one_step(self, needs: Sequence[Need]) -> list[Need]:
        """As many of each group's as there are lanes, whether or not their rows are there: what is fed together decides
        what is needed next, and must not depend on drafts."""
        counts = [0 for _ in self._unit.groups]
        chosen = []
        for need in needs:
            counts[need.group] += 1
            if counts[need.group] <= self._lanes_per_expert:
                chosen.append(need)
        return chosen

    def _may_come(self, history: History) -> bool:
        """Whether the text may still need these rows."""
        group, tokens = history
        likeliest = self._unit.history(group)
        return tokens[: len(likeliest)] == likeliest

    def _draft(self, most: int) -> dict[History, Tokens]:
        """What may follow the likeliest history that each group waits for."""
        drafted: dict[History, Tokens] = {}
        seen: set[int] = set()
        for wanted in self._wanted:
            group, tokens = wanted.history
            if group not in seen and not self._is_complete(wanted):
                seen.add(group)
                room = min(self._limits[name] for name in self._unit.groups[group].names) - len(tokens)
                drafted[wanted.history] = self._lookups[group].draft(tokens, min(most, room))
        return drafted

    def ahead(self, name: str, outcomes: Sequence[Outcome], stopwatch: Stopwatch) -> Callable[[], None] | None:
        """What can be done about one expert's outcomes of the last `calls` without those of the others, None for
        nothing. It may run in a thread, beside anything but `resume`, which must be given these outcomes all the same;
        what it takes is counted in `stopwatch`.
        """
        if any(isinstance(outcome, OpError) for outcome in outcomes):
            return None
        works = []
        placed = self._placed.get(name)
        for wanted, index in placed.wanted if placed else ():
            rows = outcomes[index]
            if isinstance(rows, Tensor) and rows.shape[0] == 1:
                wanted.rows[name] = rows[0]
                if self._is_complete(wanted):
                    names = self._unit.groups[wanted.need.group].names
                    work = self._unit.ahead(wanted.need, [wanted.rows[member] for member in names], stopwatch)
                    if work is not None:
                        works.append((wanted, work))
        return partial(_make, works) if works else None

    def resume(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Take the outcomes of the last `calls`, one per operation, and feed every need that is complete.

        An expert without outcomes was lost. Its sequences, and one that an expert says it does not have, are opened
        again from their whole history by the next `calls`.
        Raises ContextFull, ExpertFault when an expert keeps refusing, and BadLogits; after that one the next `calls`
        asks for the rows again.
        """
        for name, placed in self._placed.items():
            if name not in outcomes:
                self.lost(name)
                continue
            refused = next((o for o in outcomes[name] if isinstance(o, OpError)), None)
            if refused is not None:
                self._recover(name, refused)
                continue
            for wanted, index in placed.wanted:
                wanted.rows[name] = self._returned(name, outcomes[name][index], 1)[0]
            if placed.drafted is not None:
                rows = self._returned(name, outcomes[name][placed.drafted], len(placed.draft))
                self._keep(name, placed, rows)
        self._placed = {}
        for wanted in self._wanted:
            if self._is_complete(wanted):
                self._feed(wanted)
                self._recoveries = 0

    def serve(self, needs: Sequence[Need]) -> bool:
        """Feed `needs` if their rows have all come back already, with drafts; whether they have. Raises BadLogits as
        `resume` does.

        Some of them are not fed alone: the others might not be needed any more, and the law be another one.
        """
        waiting = [
            _Wanted(need, self._rows.get((need.group, need.tokens), {})) for need in self._of_one_step(needs)
        ]
        if not all(self._is_complete(wanted) for wanted in waiting):
            return False
        for wanted in waiting:
            self._feed(wanted)
        return True

    def _returned(self, name: str, outcome: Outcome, count: int) -> Tensor:
        if not isinstance(outcome, Tensor) or outcome.shape[0] != count:
            raise ExpertFault(name, "a forward did not return its logit row")
        return outcome

    def _keep(self, name: str, placed: _Placed, rows: Tensor) -> None:
        """Rows of a draft, until the text needs them or can no longer."""
        group, tokens = placed.wanted[0][0].history
        for count in range(1, len(placed.draft) + 1):
            key = (group, tokens + placed.draft[:count])
            self._rows.setdefault(key, {})[name] = rows[count - 1]
            if key not in self._drafts:
                self._drafts.add(key)
                self.drafted[group] += 1
                self.histories[group].add(key[1])

    def _is_complete(self, wanted: _Wanted) -> bool:
        return all(name in wanted.rows for name in self._unit.groups[wanted.need.group].names)

    def _feed(self, wanted: _Wanted) -> None:
        names = self._unit.groups[wanted.need.group].names
        try:
            self._unit.feed(wanted.need, [wanted.rows[name] for name in names], wanted.made)
        except BadLogits as fault:
            # Other rows of theirs came with the same answer.
            for rows in self._rows.values():
                for name in fault.experts:
                    rows.pop(name, None)
            raise
        self._rows.pop(wanted.history, None)
        self.histories[wanted.need.group].add(wanted.need.tokens)
        if wanted.history in self._drafts:
            self.accepted[wanted.need.group] += 1

    def lost(self, name: str) -> None:
        """The expert has lost every sequence, as one does that was started again."""
        self._lanes[name].forget_all()

    def close_expert(self, name: str) -> list[Op]:
        """Operations that free what the text holds at one expert, which then reads it anew."""
        return self._lanes[name].close()

    def _recover(self, name: str, refused: OpError) -> None:
        if refused.kind is OpErrorKind.CONTEXT_FULL:
            raise ContextFull
        self._recoveries += 1
        if refused.kind is not OpErrorKind.UNKNOWN_SEQUENCE or self._recoveries > MAX_RECOVERIES:
            raise ExpertFault(name, refused.message)
        self.lost(name)

    def close(self) -> Calls:
        """Operations that free everything this text holds at the experts."""
        return {name: ops for name, table in self._lanes.items() if (ops := table.close())}

    def _is_member(self, name: str, wanted: _Wanted) -> bool:
        return name in self._unit.groups[wanted.need.group].names
