"""The scheduler before an expert, over a real connection: what shares a step, and long prompts that are read in pieces
beside texts that are being written.
"""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from token_swarm_server.coordinator.loop import MOST_CHUNKS, SHORT, ExpertScheduler
from token_swarm_server.coordinator.mixing_pool import MixingPool, Pause
from token_swarm_server.rpc.errors import ExpertUnavailable, TransportError
from token_swarm_server.telemetry.counts import Counts
from token_swarm_server.telemetry.observer import Observer

from tests.integration.expert_serving import VOCABULARY, Watched, connected, eventually, every_transport, serving
from tests.laws.ensembles import LONG
from token_swarm.errors import BadParameter
from token_swarm.experts.contract import Close, Extend, Fork, Open, OpErrorKind, Rows, StepResult, Truncate
from token_swarm.experts.ops import row_count
from token_swarm.experts.toy import ToyExpert
from token_swarm.v1 import expert_pb2


@asynccontextmanager
async def scheduled(expert, tmp_path, prefer=expert_pb2.TRANSPORT_UNSPECIFIED, **options):
    async with serving(expert, tmp_path) as server, connected(server, tmp_path, prefer) as connection:
        scheduler = ExpertScheduler(connection, **options)
        try:
            yield scheduler
        finally:
            await scheduler.close()


async def held_up(expert, scheduler):
    """A submission whose step waits at the gate."""
    expert.gate.clear()
    expert.entered.clear()
    first = asyncio.ensure_future(scheduler.submit([Open(scheduler.allocate_sequence(), (1,))]))
    await asyncio.to_thread(expert.entered.wait, 10)
    return first


@every_transport
async def test_what_arrives_during_a_step_shares_the_next_one(tmp_path, prefer):
    expert, counts = Watched(), Counts(["toy"])
    async with scheduled(expert, tmp_path, prefer, observer=Observer([counts])) as scheduler:
        first = await held_up(expert, scheduler)
        ids = [scheduler.allocate_sequence() for _ in range(8)]
        assert len(set(ids)) == 8
        later = [
            asyncio.ensure_future(scheduler.submit([Open(sequence, (1 + sequence % 3,) * (1 + sequence))]))
            for sequence in ids
        ]
        await eventually(lambda: scheduler.queued == 8)
        expert.gate.set()
        await first
        results = await asyncio.gather(*later)
        assert [len(step) for step in expert.steps] == [1, 8]
        for sequence, (rows,) in zip(ids, results, strict=True):
            assert torch.equal(rows[0], expert.law((1 + sequence % 3,) * (1 + sequence)))
        counted = counts.experts["toy"]
        assert (counted.steps, counted.submissions, counted.rows, counted.submissions / counted.steps) == (2, 9, 9, 4.5)
        assert counted.tokens == 1 + sum(1 + sequence for sequence in ids)
        assert 0 < counted.compute.sum <= counted.seconds.sum


async def test_an_unknown_sequence_is_an_error_of_its_own_operation(tmp_path):
    async with scheduled(Watched(), tmp_path) as scheduler:
        sequence = scheduler.allocate_sequence()
        opened, lost, extended = await scheduler.submit(
            [Open(sequence, (1, 2), Rows.ALL), Extend(99, (1,)), Extend(sequence, (3,), Rows.NONE)]
        )
        assert opened.shape == (2, VOCABULARY.width)
        assert lost.kind is OpErrorKind.UNKNOWN_SEQUENCE
        assert extended.shape == (0, VOCABULARY.width)


async def test_a_cancelled_caller_leaves_what_was_sent_and_drops_what_was_not(tmp_path):
    expert = Watched()
    async with scheduled(expert, tmp_path) as scheduler:
        sent = await held_up(expert, scheduler)
        waiting = asyncio.ensure_future(scheduler.submit([Open(40, (1,))]))
        await eventually(lambda: scheduler.queued == 1)
        for task in (sent, waiting):
            task.cancel()
        await asyncio.wait([sent, waiting])
        expert.gate.set()
        await scheduler.submit([Open(41, (1,))])
        assert expert.held == {0, 41}
        scheduler.release([0, 41])
        await eventually(lambda: not expert.held)


async def test_batches_keep_to_the_rows_of_a_step(tmp_path):
    expert = Watched()
    async with serving(expert, tmp_path) as server, connected(server, tmp_path) as connection:
        connection.max_rows = 4
        scheduler = ExpertScheduler(connection)
        first = await held_up(expert, scheduler)
        later = [asyncio.ensure_future(scheduler.submit([Open(9 + n, (1,) * 3, Rows.ALL)])) for n in range(3)]
        await eventually(lambda: scheduler.queued == 3)
        expert.gate.set()
        _, *results = await asyncio.gather(first, *later)
        assert [sum(map(row_count, step)) for step in expert.steps] == [1, 4, 4, 1]
        for (rows,) in results:
            assert torch.equal(rows, torch.stack([expert.law((1,) * length) for length in (1, 2, 3)]))
        with pytest.raises(BadParameter, match="at most 4 rows"):
            await scheduler.submit([Open(20, (1,) * 5, Rows.ALL)])
        await scheduler.close()


async def test_two_schedulers_of_one_expert_may_share_a_step(tmp_path):
    expert = Watched()
    async with (
        serving(expert, tmp_path) as server,
        connected(server, tmp_path) as one,
        connected(server, tmp_path) as two,
        connected(server, tmp_path) as three,
    ):
        expert.gate.clear()
        expert.entered.clear()
        first = asyncio.create_task(one.step([Open(0, (1,))]))
        await asyncio.to_thread(expert.entered.wait, 10)
        later = [asyncio.create_task(each.step([Open(0, (n,), Rows.ALL)])) for n, each in ((2, two), (3, three))]
        await eventually(lambda: server._worker.queued == 2)
        expert.gate.set()
        await first
        results = await asyncio.gather(*later)
        assert [len(step) for step in expert.steps] == [1, 2]
        for token, result in zip((2, 3), results, strict=True):
            assert torch.equal(result.rows(0)[0], expert.law((token,)))
            assert result.batch_size == 2


async def test_closing_the_scheduler_fails_what_waits(tmp_path):
    expert = Watched()
    async with scheduled(expert, tmp_path) as scheduler:
        first = await held_up(expert, scheduler)
        later = asyncio.ensure_future(scheduler.submit([Open(9, (1,))]))
        await eventually(lambda: scheduler.queued == 1)
        await scheduler.close()
        for task in (first, later):
            with pytest.raises(ExpertUnavailable, match="closed"):
                await task
        expert.gate.set()


# Long prompts


class Recorder(ToyExpert):
    """Keeps the operations of every step."""

    def __init__(self, **options: Any) -> None:
        super().__init__("toy", LONG, max_context=900, **options)
        self.steps: list[list[Any]] = []

    def step(self, ops: Any) -> StepResult:
        self.steps.append(list(ops))
        return super().step(ops)

    @property
    def fed(self) -> list[int]:
        """Tokens of each step."""
        return [sum(len(op.tokens) for op in step if isinstance(op, Open | Extend)) for step in self.steps]


@asynccontextmanager
async def recorded(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Recorder, ExpertScheduler]]:
    expert = Recorder(**options.pop("expert", {}))
    async with scheduled(expert, tmp_path, **options) as scheduler:
        yield expert, scheduler


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("rows", [Rows.LAST, Rows.ALL, Rows.NONE])
async def test_a_long_prompt_is_read_in_pieces_and_gives_the_same_rows(tmp_path: Path, rows: Rows) -> None:
    prompt, more = tokens(100), tokens(50, seed=1)
    async with recorded(tmp_path, chunk=32) as (expert, scheduler):
        opened, forked, cut, extended = await scheduler.submit(
            [Open(0, prompt, rows), Fork(0, 1), Truncate(1, 60), Extend(1, more, rows)]
        )
        assert expert.fed == [32, 32, 32, 32, 22]
        first = {Rows.LAST: 99, Rows.ALL: 0, Rows.NONE: 100}[rows]
        assert isinstance(opened, torch.Tensor)
        assert isinstance(extended, torch.Tensor)
        expected = [expert.law(prompt[: end + 1]) for end in range(first, 100)]
        assert len(opened) == len(expected)
        assert all(torch.equal(row, law) for row, law in zip(opened, expected, strict=True))
        history = prompt[:60] + more
        first = {Rows.LAST: 109, Rows.ALL: 60, Rows.NONE: 110}[rows]
        expected = [expert.law(history[: end + 1]) for end in range(first, 110)]
        assert all(torch.equal(row, law) for row, law in zip(extended, expected, strict=True))
        assert forked.shape[0] == cut.shape[0] == 0  # type: ignore[union-attr]


async def test_texts_that_are_written_take_part_in_every_step(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20) as (expert, scheduler):
        for sequence in range(4):
            await scheduler.submit([Open(sequence, (1,))])
        expert.steps.clear()
        long = scheduler.submit([Open(9, tokens(200))])

        async def write(sequence: int) -> int:
            steps = 0
            while not long.done():
                await scheduler.submit([Extend(sequence, (2,))])
                steps += 1
            return steps

        written = await asyncio.gather(*(write(sequence) for sequence in range(4)))
        # Ten pieces of 20; every text got a token out of nearly every one of these steps, and none more.
        assert max(expert.fed) <= 20 + 4
        assert min(written) >= 8
        (row,) = await long
        assert torch.equal(row[0], expert.law(tokens(200)))  # type: ignore[index]


async def test_prompts_take_turns(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20) as (_, scheduler):
        order: list[str] = []
        first = scheduler.submit([Open(0, tokens(400))])
        second = scheduler.submit([Open(1, tokens(60, seed=1))])
        first.add_done_callback(lambda _: order.append("400 tokens"))
        second.add_done_callback(lambda _: order.append("60 tokens"))
        await asyncio.gather(first, second)
        assert order == ["60 tokens", "400 tokens"]


async def test_prompts_that_hold_up_nobody_are_read_in_large_pieces(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20, writers=lambda: 0) as (expert, scheduler):
        await scheduler.submit([Open(0, tokens(800))])
        most = 20 * MOST_CHUNKS
        assert expert.fed == [most, most, 800 - 2 * most]


@pytest.mark.parametrize(
    ("prompts", "writers", "chunks"), [(1, 1, 1), (1, 3, 1), (6, 1, 6), (6, 2, 3), (5, 3, 2), (30, 1, 16)]
)
async def test_a_text_bears_a_chunk_for_each_prompt_that_waits_for_it(
    tmp_path: Path, prompts: int, writers: int, chunks: int
) -> None:
    async with recorded(tmp_path, chunk=20, writers=lambda: writers) as (expert, scheduler):
        texts = [scheduler.submit([Open(index, tokens(400, seed=index))]) for index in range(prompts)]
        while not expert.fed:
            await asyncio.sleep(0)
        assert expert.fed[0] == 20 * chunks
        for text in texts:
            text.cancel()


async def test_a_cancelled_prompt_is_not_read_to_its_end(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20) as (expert, scheduler):
        long = scheduler.submit([Open(0, tokens(800))])
        while len(expert.steps) < 3:
            await asyncio.sleep(0)
        long.cancel()
        scheduler.release([0])
        await scheduler.submit([Open(1, (1,))])
        assert sum(expert.fed) < 400
        assert set(expert._held) == {1}


async def test_a_prompt_that_is_refused_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20) as (expert, scheduler):
        await scheduler.submit([Open(0, tokens(880), Rows.NONE)])
        (refused,) = await scheduler.submit([Extend(0, tokens(40, seed=1))])
        assert refused.kind is OpErrorKind.CONTEXT_FULL  # type: ignore[union-attr]
        (lost,) = await scheduler.submit([Extend(0, (1,))])
        # It had grown, so it is closed: whoever needs it opens it anew.
        assert lost.kind is OpErrorKind.UNKNOWN_SEQUENCE  # type: ignore[union-attr]
        assert not expert._held
        (taken,) = await scheduler.submit([Open(3, (1, 77, *tokens(60)))])
        assert taken.kind is OpErrorKind.INVALID  # type: ignore[union-attr]


class Breaks:
    """A connection that breaks at the third step. `given`: logits of the steps before, for as long as they are held."""

    def __init__(self, connection: Any) -> None:
        self.spec = connection.spec
        self.max_rows = connection.max_rows
        self.given: list[weakref.ref[torch.Tensor]] = []
        self._connection = connection

    async def step(self, ops: Any) -> Any:
        if len(self.given) == 2:
            raise TransportError("the connection broke")
        result = await self._connection.step(ops)
        self.given.append(weakref.ref(result.logits))
        return result


async def test_logits_of_a_prompt_that_a_broken_connection_ends_are_let_go_at_once(tmp_path: Path) -> None:
    # An error holds the frames it went through; logits that these hold stay until the collector of cycles comes by,
    # which in a process with large vocabularies is seldom.
    async with serving(Recorder(), tmp_path) as server, connected(server, tmp_path) as connection:
        breaks = Breaks(connection)
        scheduler = ExpertScheduler(breaks, chunk=20)
        gc.disable()
        try:
            with pytest.raises(ExpertUnavailable, match="broke"):
                await scheduler.submit([Open(0, tokens(100), Rows.ALL)])
            await scheduler.close()
            assert [held() for held in breaks.given] == [None, None]
        finally:
            gc.enable()


async def test_what_is_released_is_free_for_a_prompt_of_the_same_step(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20, expert={"max_sequences": 1}) as (_, scheduler):
        await scheduler.submit([Open(0, (1,))])
        scheduler.release([0])
        (row,) = await scheduler.submit([Open(1, tokens(SHORT + 1))])
        assert isinstance(row, torch.Tensor)


async def test_a_request_learns_where_its_time_went(tmp_path: Path) -> None:
    async with recorded(tmp_path, chunk=20) as (expert, scheduler):
        with Observer().request("generate") as watch:
            await scheduler.submit([Open(0, tokens(100))], watch)
            await scheduler.submit([Extend(0, (1,)), Close(0)], watch)
        spent = watch.experts["toy"]
        assert spent.tokens == 101
        assert min(spent.queue, spent.compute, spent.transport) >= 0
        assert spent.compute > 0
        assert len(expert.steps) == 6
        assert spent.queue + spent.compute + spent.transport <= (watch.ended_at or 0) - watch.started_at


@pytest.mark.parametrize("settling", [True, False], ids=["waits", "does not wait"])
async def test_a_step_waits_for_texts_that_it_could_take_along(tmp_path: Path, settling: bool) -> None:
    """Two texts that one step answered are in the next one together, though one of them takes longer to ask."""
    pool = MixingPool(2)
    async with recorded(tmp_path, **({"settle": pool.settle} if settling else {})) as (expert, scheduler):

        async def write(sequence: int) -> None:
            op: Open | Extend = Open(sequence, (1,))
            pauses: list[Pause] = []
            for _ in range(10):
                asked = scheduler.submit([op])
                asked.add_done_callback(lambda _: pauses.append(pool.pause()))
                while pauses:
                    pauses.pop().end()
                await asked
                await pool.mix(partial(time.sleep, 0.01 * sequence))
                op = Extend(sequence, (2,))
            pauses.pop().end()

        await asyncio.gather(write(0), write(1))
        together = sum(count == 2 for count in expert.fed)
        # Without waiting, which is the mutant, the faster text is always a step ahead.
        assert together == 10 if settling else together < 5
    pool.close()
