"""Turns "these histories need a forward" into operations per expert, and logit rows back into the unit.

This is the sans-I/O seam: `calls` says what to run, `resume` takes what came back. The same code runs in one
process, in the server, and against toy experts in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from token_swarm.decoding.lanes import LaneTable
from token_swarm.errors import BadLogits, ExpertFault
from token_swarm.experts.contract import Op, OpError, OpErrorKind
from token_swarm.mixing.unit import MixingUnit, Need

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
    need: Need
    rows: dict[str, Tensor]
    made: object | None = None
    """What was made of complete rows before all experts had answered."""


def _make(works: Sequence[tuple[_Wanted, Callable[[], object]]]) -> None:
    for wanted, work in works:
        # `resume` meets the same rows, and is where an expert is blamed.
        with suppress(BadLogits):
            wanted.made = work()


class Forwards:
    """The forwards of one text: lanes per expert, rows that have come back, and counts."""

    def __init__(self, unit: MixingUnit, allocate: Callable[[str], int], lanes_per_expert: int) -> None:
        self._unit = unit
        self._lanes: dict[str, LaneTable] = {}
        self._limits: dict[str, int] = {}
        for group in unit.groups:
            for spec in group.experts:
                name = spec.name
                self._lanes[name] = LaneTable(lambda name=name: allocate(name), lanes_per_expert)  # type: ignore[misc]
                self._limits[name] = spec.max_context
        self._wanted: list[_Wanted] = []
        self._placed: dict[str, list[tuple[_Wanted, int]]] = {}
        self._recoveries = 0
        self.histories: list[set[tuple[int, ...]]] = [set() for _ in unit.groups]
        """Per group: the histories that were forwarded."""

    def calls(self, needs: Sequence[Need]) -> Calls:
        """What must run before the unit has a law, which `needs` says; empty when it has one. Raises ContextFull."""
        known = {(wanted.need.group, wanted.need.tokens): wanted.rows for wanted in self._wanted}
        self._wanted = [_Wanted(need, known.get((need.group, need.tokens), {})) for need in needs]
        calls: Calls = {}
        self._placed = {}
        for name, table in self._lanes.items():
            waiting = [wanted for wanted in self._wanted if self._is_member(name, wanted) and name not in wanted.rows]
            if not waiting:
                continue
            for wanted in waiting:
                if len(wanted.need.tokens) > self._limits[name]:
                    raise ContextFull
            keep = partial(self._unit.history, waiting[0].need.group)
            plan = table.plan([wanted.need.tokens for wanted in waiting], keep)
            calls[name] = plan.ops
            self._placed[name] = [
                (wanted, index) for wanted, index in zip(waiting, plan.rows, strict=True) if index is not None
            ]
        return calls

    def ahead(self, name: str, outcomes: Sequence[Outcome]) -> Callable[[], None] | None:
        """What can be done about one expert's outcomes of the last `calls` before the others have answered, None for
        nothing. It may run in a thread, beside anything but `resume`, which must be given these outcomes all the same.
        """
        if any(isinstance(outcome, OpError) for outcome in outcomes):
            return None
        works = []
        for wanted, index in self._placed.get(name, ()):
            rows = outcomes[index]
            if isinstance(rows, Tensor) and rows.shape[0] == 1:
                wanted.rows[name] = rows[0]
                names = self._unit.groups[wanted.need.group].names
                if all(member in wanted.rows for member in names):
                    work = self._unit.ahead(wanted.need, [wanted.rows[member] for member in names])
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
            for wanted, index in placed:
                rows = outcomes[name][index]
                if not isinstance(rows, Tensor) or rows.shape[0] != 1:
                    raise ExpertFault(name, "a forward did not return its logit row")
                wanted.rows[name] = rows[0]
        self._placed = {}
        for wanted in self._wanted:
            names = self._unit.groups[wanted.need.group].names
            if all(name in wanted.rows for name in names):
                self._feed(wanted, names)
                self.histories[wanted.need.group].add(wanted.need.tokens)
                self._recoveries = 0

    def _feed(self, wanted: _Wanted, names: Sequence[str]) -> None:
        try:
            self._unit.feed(wanted.need, [wanted.rows[name] for name in names], wanted.made)
        except BadLogits as fault:
            # Other rows of theirs came with the same answer.
            for waiting in self._wanted:
                for name in fault.experts:
                    waiting.rows.pop(name, None)
            raise

    def lost(self, name: str) -> None:
        """The expert has lost every sequence, as one does that was started again."""
        self._lanes[name].forget_all()

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
