"""Where texts are mixed: alone in the event loop, several at once in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from token_swarm_server.coordinator.mixing_pool import MixingPool

SECONDS = 20.0


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def pool() -> Iterator[MixingPool]:
    made = MixingPool(2)
    yield made
    made.close()


async def test_a_text_alone_stays_in_the_event_loop(pool: MixingPool) -> None:
    assert await pool.mix(threading.get_ident) == threading.get_ident()


async def test_one_thread_is_the_event_loop() -> None:
    pool = MixingPool(1)
    ran = await asyncio.gather(*(pool.mix(threading.get_ident) for _ in range(3)))
    assert set(ran) == {threading.get_ident()}


async def test_several_are_mixed_at_the_same_time(pool: MixingPool) -> None:
    together = threading.Barrier(2)

    def job() -> int:
        together.wait(SECONDS)
        return threading.get_ident()

    ran = await asyncio.gather(*(pool.mix(job) for _ in range(2)))
    assert len(set(ran)) == 2
    assert threading.get_ident() not in ran


async def test_each_thread_gets_a_share(pool: MixingPool) -> None:
    ran = await asyncio.gather(
        *(pool.mix(lambda number=number: (number, threading.get_ident())) for number in range(7))
    )  # type: ignore[misc]
    assert [number for number, _ in ran] == list(range(7))
    assert threading.get_ident() not in {thread for _, thread in ran}


async def test_a_failure_is_its_own_texts(pool: MixingPool) -> None:
    def fail() -> int:
        raise ValueError("no law")

    for others in (0, 2):
        failed, *rest = await asyncio.gather(
            pool.mix(fail), *(pool.mix(lambda: 1) for _ in range(others)), return_exceptions=True
        )
        assert isinstance(failed, ValueError)
        assert rest == [1] * others


async def test_a_cancelled_text_is_left_alone_only_when_its_job_has_ended(pool: MixingPool) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        go.wait(SECONDS)
        ended.set()

    texts = [asyncio.create_task(pool.mix(job)), asyncio.create_task(pool.mix(lambda: None))]
    await asyncio.to_thread(begun.wait, SECONDS)
    for _ in range(3):
        texts[0].cancel()
        await turns()
        assert not texts[0].done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await texts[0]
    assert ended.is_set()
    await texts[1]


async def test_settling_waits_for_those_that_pause_now(pool: MixingPool) -> None:
    await asyncio.wait_for(pool.settle(), SECONDS)  # nobody: at once
    first, second = pool.pause(), pool.pause()
    settled = asyncio.create_task(pool.settle())
    await turns()
    later = pool.pause()
    first.end()
    first.end()
    await turns()
    assert not settled.done()
    second.end()
    await asyncio.wait_for(settled, SECONDS)
    later.end()


async def test_a_long_job_holds_nobody_up(pool: MixingPool) -> None:
    go = threading.Event()
    long = asyncio.create_task(pool.aside(lambda: go.wait(SECONDS)))
    await turns()
    assert await pool.mix(threading.get_ident) == threading.get_ident()
    go.set()
    assert await long


@pytest.mark.parametrize("others", [0, 2])
async def test_work_that_was_begun_ends_without_anybody_waiting(pool: MixingPool, others: int) -> None:
    ended = threading.Event()
    work = pool.begin(ended.set)
    alone = [pool.begin(lambda: None) for _ in range(others)]
    await asyncio.wait_for(asyncio.gather(work, *alone), SECONDS)
    assert ended.is_set()
    # It counts as running no longer: a text that is alone again stays in the event loop.
    assert await pool.mix(threading.get_ident) == threading.get_ident()
