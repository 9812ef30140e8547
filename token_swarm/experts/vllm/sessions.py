"""What a vLLM expert knows of its sequences, and which of them share the KV when it is too small for all.

The token history here is the truth; the KV in vLLM is a cache of its first `cached` tokens. A session that lost its
KV is forwarded again, whole, when it is extended the next time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True, eq=False)
class Session:
    """One sequence: its tokens, and the request that holds its KV (None: no KV)."""

    tokens: list[int]
    request: str | None = None
    cached: int = 0
    closed: bool = False
    # (position, row of the step's result)
    wanted: list[tuple[int, int]] = field(default_factory=list)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.tokens[length:]
        self.cached = min(self.cached, length)


class Pool(Protocol):
    """The KV that sessions share, in blocks."""

    @property
    def free_blocks(self) -> int:
        """Blocks that no request holds."""
        ...

    def held_blocks(self, request: str) -> int:
        """Blocks of a request."""
        ...

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of `tokens` tokens needs."""
        ...

    def release(self, requests: Collection[str]) -> None:
        """Free the blocks of requests."""
        ...


class KvShare:
    """Decides who has KV. Any one session fits: the expert refuses to start otherwise."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # In the order of their latest use.
        self._holders: dict[Session, None] = {}
        self.evictions = 0
        """Sessions that lost their KV to others."""
        self.recomputed = 0
        """Tokens that had KV and need another forward, for that or because a fork starts without."""

    def waves(self, waiting: Sequence[Session]) -> Iterator[list[Session]]:
        """Split `waiting` into groups that fit into the KV at once; forward each before asking for the next.

        Room comes first from sessions that do not wait, the longest unused first, then from those at the end of
        the queue.
        """
        queue = list(waiting)
        while queue:
            for session in queue:
                self._holders.pop(session, None)
            idle = iter(list(self._holders))
            wave: list[Session] = []
            free = self._pool.free_blocks
            for session in queue:
                needed = self._missing(session)
                while needed > free and (victim := next(idle, None)) is not None:
                    free += self._evict(victim)
                if needed > free and not wave:
                    for victim in reversed(queue[1:]):
                        if needed <= free:
                            break
                        free += self._evict(victim)
                if needed > free:
                    break
                free -= needed
                wave.append(session)
            if not wave:
                raise RuntimeError(f"a sequence of {len(queue[0].tokens)} tokens does not fit into the KV")
            queue = queue[len(wave) :]
            # Who still waits keeps its KV and its turn.
            self._holders |= dict.fromkeys(session for session in queue if session.request is not None)
            self._holders |= dict.fromkeys(wave)
            yield wave

    def release(self, session: Session) -> None:
        """Free a session's KV."""
        self._holders.pop(session, None)
        if session.request is not None:
            self._pool.release([session.request])
        session.request, session.cached = None, 0

    def release_all(self) -> None:
        """Free the KV of every session, also of those that nobody knows any more."""
        for session in list(self._holders):
            self.release(session)

    def _missing(self, session: Session) -> int:
        held = 0 if session.request is None else self._pool.held_blocks(session.request)
        return max(0, self._pool.blocks_for(len(session.tokens)) - held)

    def _evict(self, session: Session) -> int:
        """Free a session's KV for another; how many blocks that gave."""
        if session.request is None:
            return 0
        before = self._pool.free_blocks
        self.recomputed += session.cached
        self.release(session)
        self.evictions += 1
        return self._pool.free_blocks - before
