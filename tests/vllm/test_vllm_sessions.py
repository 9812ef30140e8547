"""Who has KV when there is too little for all: against a pool that refuses to be overdrawn. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm.experts.vllm.sessions import KvShare, Session

BLOCK = 4


class CountingPool:
    def __init__(self, blocks: int) -> None:
        self.free_blocks = blocks
        self._held: dict[str, int] = {}

    def held_blocks(self, request: str) -> int:
        return self._held[request]

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK)

    def release(self, requests: Collection[str]) -> None:
        for request in requests:
            self.free_blocks += self._held.pop(request)

    def forward(self, session: Session) -> None:
        """What the engine does with a session: it takes the blocks that are missing."""
        if session.request is None:
            session.request = f"r{id(session)}"
            self._held[session.request] = 0
        missing = max(0, self.blocks_for(len(session.tokens)) - self._held[session.request])
        assert missing <= self.free_blocks, "overdrawn: vLLM would wait for ever"
        self.free_blocks -= missing
        self._held[session.request] += missing
        session.cached = len(session.tokens)


def run(share: KvShare, pool: CountingPool, waiting: list[Session]) -> list[list[Session]]:
    waves = []
    for wave in share.waves(waiting):
        for session in wave:
            pool.forward(session)
        waves.append(wave)
    return waves


def sessions(*lengths: int) -> list[Session]:
    return [Session([0] * length) for length in lengths]


def test_what_fits_runs_at_once() -> None:
    pool = CountingPool(6)
    share = KvShare(pool)
    one, two, three = sessions(8, 8, 8)
    assert run(share, pool, [one, two, three]) == [[one, two, three]]
    assert pool.free_blocks == 0
    assert share.evictions == 0


def test_the_longest_unused_makes_room() -> None:
    pool = CountingPool(6)
    share = KvShare(pool)
    one, two, three, four = sessions(8, 8, 8, 8)
    run(share, pool, [one, two, three])
    one.tokens += [1]
    two.tokens = two.tokens[:]
    run(share, pool, [two])
    assert run(share, pool, [four]) == [[four]]
    assert (one.request, one.cached) == (None, 0)
    assert two.request is not None
    assert (share.evictions, share.recomputed) == (1, 8)


def test_sessions_take_turns_when_they_do_not_fit_together() -> None:
    pool = CountingPool(5)
    share = KvShare(pool)
    one, two, three = sessions(8, 12, 8)
    assert run(share, pool, [one, two, three]) == [[one, two], [three]]
    big = Session([0] * 20)
    assert run(share, pool, [three, big]) == [[three], [big]]
    assert pool.free_blocks == 0


def test_room_comes_from_the_end_of_the_queue_in_need() -> None:
    pool = CountingPool(5)
    share = KvShare(pool)
    one, two = sessions(4, 16)
    run(share, pool, [one, two])
    one.tokens += [0] * 4
    assert run(share, pool, [one, two]) == [[one], [two]]


def test_releasing_frees_and_closing_twice_does_no_harm() -> None:
    pool = CountingPool(4)
    share = KvShare(pool)
    (one,) = sessions(9)
    run(share, pool, [one])
    share.release(one)
    share.release(one)
    assert pool.free_blocks == 4


def test_a_session_larger_than_the_kv_is_an_error() -> None:
    pool = CountingPool(2)
    with pytest.raises(RuntimeError, match="a sequence of 9 tokens does not fit into the KV"):
        run(KvShare(pool), pool, sessions(9))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_course_of_events_is_served_without_overdraft(data: st.DataObject) -> None:
    pool = CountingPool(data.draw(st.integers(5, 12)))
    blocks = pool.free_blocks
    share = KvShare(pool)
    alive: list[Session] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if not alive or data.draw(st.booleans()):
            alive.append(Session([]))
        if len(alive) > 1 and data.draw(st.integers(0, 5)) == 0:
            share.release(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        step = data.draw(st.lists(st.sampled_from(range(len(alive))), min_size=1, max_size=6, unique=True))
        for index in step:
            session = alive[index]
            if session.tokens and data.draw(st.booleans()):
                session.truncate(data.draw(st.integers(0, len(session.tokens))))
            room = 5 * BLOCK - len(session.tokens)
            session.tokens += [0] * data.draw(st.integers(1, room)) if room else []
        waves = run(share, pool, [alive[index] for index in step])
        assert [session for wave in waves for session in wave] == [alive[index] for index in step]
    for session in alive:
        share.release(session)
    assert pool.free_blocks == blocks
