"""The queue before one expert: what arrives while a step runs makes up the next step."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from token_swarm.decoding.forwards import Outcome
from token_swarm.experts.contract import Close, ExpertSpec, Extend, Op, Open
from token_swarm_server.errors import ExpertUnavailable, TransportError
from token_swarm_server.wire import TimedStepResult, check_ops


class StepRunner(Protocol):
    """What a scheduler needs of an ExpertConnection."""

    spec: ExpertSpec
    max_rows: int

    async def step(self, ops: Sequence[Op]) -> TimedStepResult:
        """Apply `ops`."""
        ...


@dataclass(slots=True)
class Counters:
    """Running totals over steps. Times in seconds.

    `submissions`: how many submissions the steps were made of. `tokens`: given to sequences.
    `seconds`: from sending a step to its answer. `compute_seconds`: of that, in the expert.
    """

    steps: int = 0
    submissions: int = 0
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def batch_size(self) -> float:
        """Mean number of submissions in a step."""
        return self.submissions / self.steps if self.steps else 0.0


@dataclass(eq=False, slots=True)
class _Submission:
    ops: tuple[Op, ...]
    rows: int
    results: asyncio.Future[list[Outcome]]


class ExpertScheduler:
    """Batches the operations of concurrent requests; one per connection, within a running event loop.

    There are no timers: an idle expert gets what is pending at once, a busy one gets everything that arrived
    meanwhile in its next step, in order of arrival.
    """

    def __init__(self, connection: StepRunner) -> None:
        self.name = connection.spec.name
        self.counters = Counters()
        self._connection = connection
        self._ids = itertools.count()
        self._pending: deque[_Submission] = deque()
        self._wake = asyncio.Event()
        self._down: ExpertUnavailable | None = None
        self._task = asyncio.create_task(self._run())

    def allocate_sequence(self) -> int:
        """A sequence id that this connection has not used."""
        return next(self._ids)

    @property
    def queued(self) -> int:
        """Submissions that wait for a step."""
        return len(self._pending)

    async def submit(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply `ops` in order, in one step shared with others; one result per operation.

        If the caller is cancelled, operations that were already sent are applied all the same, and others
        are dropped; `release` then frees its sequences in either case.
        Raises BadParameter as `wire.check_ops` does, and ExpertUnavailable if the expert is gone.
        """
        return await self._enqueue(tuple(ops), check_ops(ops, self._connection.max_rows))

    def release(self, sequences: Iterable[int]) -> None:
        """Free sequences after everything submitted before. Never waits and never fails."""
        if self._down is None:
            self._enqueue(tuple(Close(sequence) for sequence in sequences), 0)

    async def close(self) -> None:
        """Fail what is pending and stop. The connection stays, but cannot take another step."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _enqueue(self, ops: tuple[Op, ...], rows: int) -> asyncio.Future[list[Outcome]]:
        if self._down is not None:
            raise ExpertUnavailable(self.name, "it was lost") from self._down
        results: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        # A release has nobody who would look at its failure.
        results.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._pending.append(_Submission(ops, rows, results))
        self._wake.set()
        return results

    async def _run(self) -> None:
        batch: list[_Submission] = []
        down = ExpertUnavailable(self.name, "the connection was closed")
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while batch := self._take():
                    await self._step(batch)
        except ExpertUnavailable as error:
            down = error
        except TransportError as error:
            down = ExpertUnavailable(self.name, str(error))
        finally:
            # Also for a cancelled or broken loop: nobody may wait for ever.
            self._down = down
            for submission in (*batch, *self._pending):
                if not submission.results.done():
                    submission.results.set_exception(down)
            self._pending.clear()

    def _take(self) -> list[_Submission]:
        """Everything pending, as far as its rows fit one step; without what nobody waits for any more."""
        batch: list[_Submission] = []
        rows = 0
        while self._pending:
            submission = self._pending[0]
            if not submission.results.done():
                rows += submission.rows
                if batch and rows > self._connection.max_rows:
                    break
                batch.append(submission)
            self._pending.popleft()
        return batch

    async def _step(self, batch: list[_Submission]) -> None:
        ops = [op for submission in batch for op in submission.ops]
        started = time.perf_counter()
        result = await self._connection.step(ops)
        counters = self.counters
        counters.steps += 1
        counters.submissions += len(batch)
        counters.tokens += sum(len(op.tokens) for op in ops if isinstance(op, Open | Extend))
        counters.rows += len(result.logits)
        counters.seconds += time.perf_counter() - started
        counters.compute_seconds += result.seconds
        index = 0
        for submission in batch:
            answers: list[Outcome] = []
            for _ in submission.ops:
                error = result.errors[index]
                answers.append(result.rows(index) if error is None else error)
                index += 1
            if not submission.results.done():
                submission.results.set_result(answers)
