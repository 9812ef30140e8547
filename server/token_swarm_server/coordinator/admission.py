"""Who may decode now: KV sequences per expert are handed out first come, first served, from a bounded queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from token_swarm_server.rpc.errors import QueueFull


@dataclass(eq=False, slots=True)
class _Waiter:
    experts: tuple[str, ...]
    lanes: int
    size: int
    admitted: asyncio.Future[None]
    holds: bool = False


class Admission:
    """Counts the free KV sequences of every expert.

    A text takes its sequences on all its experts at once or waits, so two texts can never hold what the other
    one needs. Nobody overtakes: a text with many experts is not starved by texts with one.
    """

    def __init__(self, sequences: Mapping[str, int], max_queue: int, max_queue_bytes: int) -> None:
        """`max_queue`: texts that may wait; `max_queue_bytes`: what their prompts may come to."""
        self.sequences = dict(sequences)
        """KV sequences of every expert, held or free."""
        self._free = dict(sequences)
        self._max_queue = max_queue
        self._max_queue_bytes = max_queue_bytes
        self._waiters: deque[_Waiter] = deque()

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiters)

    def free(self, expert: str) -> int:
        """KV sequences of `expert` that no text holds."""
        return self._free[expert]

    def require_room(self, experts: Collection[str], lanes: int, size: int) -> None:
        """Raise QueueFull if a text whose prompt has `size` bytes could neither start nor wait."""
        if not self._waiters and all(self._free[name] >= lanes for name in experts):
            return
        if len(self._waiters) >= self._max_queue:
            raise QueueFull(f"{len(self._waiters)} requests are waiting, which is the most allowed")
        waiting = sum(waiter.size for waiter in self._waiters)
        if waiting + size > self._max_queue_bytes:
            raise QueueFull(
                f"the prompts of {len(self._waiters)} waiting requests have {waiting} bytes and this one {size}; "
                f"together at most {self._max_queue_bytes} are allowed"
            )

    @asynccontextmanager
    async def hold(self, experts: Collection[str], lanes: int, size: int = 0) -> AsyncIterator[None]:
        """Hold `lanes` sequences on each of `experts`. `size`: bytes of prompt. Raises QueueFull as `require_room`."""
        self.require_room(experts, lanes, size)
        waiter = _Waiter(tuple(experts), lanes, size, asyncio.get_running_loop().create_future())
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
