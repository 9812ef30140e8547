"""Who may decode now: KV sequences per expert are handed out first come, first served, from a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from token_swarm_server.errors import QueueFull


@dataclass(eq=False, slots=True)
class _Waiter:
    experts: tuple[str, ...]
    lanes: int
    admitted: asyncio.Future[None]
    holds: bool = False


class Admission:
    """Counts the free KV sequences of every expert.

    A text takes its sequences on all its experts at once or waits, so two texts can never hold what the other
    one needs. Nobody overtakes: a text with many experts is not starved by texts with one.
    """

    def __init__(self, sequences: Mapping[str, int], max_queue: int) -> None:
        self._free = dict(sequences)
        self._max_queue = max_queue
        self._waiters: deque[_Waiter] = deque()

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiters)

    def free(self, expert: str) -> int:
        """KV sequences of `expert` that no text holds."""
        return self._free[expert]

    @asynccontextmanager
    async def hold(self, experts: Collection[str], lanes: int) -> AsyncIterator[None]:
        """Hold `lanes` sequences on each of `experts`. Raises QueueFull when the queue is."""
        waiter = _Waiter(tuple(experts), lanes, asyncio.get_running_loop().create_future())
        must_wait = bool(self._waiters) or not self._fits(waiter)
        if must_wait and len(self._waiters) >= self._max_queue:
            raise QueueFull(f"{len(self._waiters)} requests are waiting, which is the most allowed")
        self._waiters.append(waiter)
        self._admit()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter.holds:
                self._give_back(waiter)
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
                self._admit()
            raise
        try:
            yield
        finally:
            self._give_back(waiter)

    def _fits(self, waiter: _Waiter) -> bool:
        return all(self._free[name] >= waiter.lanes for name in waiter.experts)

    def _admit(self) -> None:
        while self._waiters and self._fits(self._waiters[0]):
            waiter = self._waiters.popleft()
            if waiter.admitted.cancelled():
                continue
            waiter.holds = True
            for name in waiter.experts:
                self._free[name] -= waiter.lanes
            waiter.admitted.set_result(None)

    def _give_back(self, waiter: _Waiter) -> None:
        for name in waiter.experts:
            self._free[name] += waiter.lanes
        self._admit()
