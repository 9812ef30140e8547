"""The queue before one expert: what arrives while a step runs makes up the next step."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from token_swarm.decoding.forwards import Outcome
from token_swarm.experts.contract import Close, ExpertSpec, Extend, Op, Open, Rows
from token_swarm.experts.ops import row_count
from token_swarm_server.expert_protocol.messages import TimedStepResult, check_ops
from token_swarm_server.rpc.errors import ExpertUnavailable, TransportError
from token_swarm_server.telemetry.observer import Observer, Step, Watch

SHORT = 16
"""Tokens of a submission that is never made to wait for a longer one: a decoding step of several heads."""
MOST_CHUNKS = 16
"""Of prompts in a step: what it has room for while there is nobody to hold up."""


class StepRunner(Protocol):
    """What a scheduler needs of an ExpertConnection."""

    spec: ExpertSpec
    max_rows: int

    async def step(self, ops: Sequence[Op]) -> TimedStepResult:
        """Apply `ops`."""
        ...


@dataclass(eq=False, slots=True)
class _Submission:
    """Operations of one text. `work`: what is left, with the index of the operation it belongs to; an operation with
    more tokens than a step has room for goes in pieces. `rows`: those that have come back, by operation."""

    work: deque[tuple[int, Op]]
    results: asyncio.Future[list[Outcome]]
    watch: Watch | None
    tokens: int
    arrived: float
    outcomes: list[Outcome | None]
    rows: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    compute: float = 0.0
    travel: float = 0.0

    def take(self, tokens: int, rows: int) -> list[tuple[int, Op]]:
        """The next operations, of at most so many tokens and logit rows."""
        taken: list[tuple[int, Op]] = []
        while self.work:
            index, op = self.work[0]
            if isinstance(op, Open | Extend):
                room = min(tokens, rows) if op.rows is Rows.ALL else tokens
                if room < 1 or (op.rows is Rows.LAST and rows < 1):
                    break
                first = len(op.tokens) if len(op.tokens) <= room else room
                op, rest = _split(op, first)
                tokens -= first
                rows -= row_count(op)
                if rest is not None:
                    self.work[0] = (index, rest)
                    taken.append((index, op))
                    break
            self.work.popleft()
            taken.append((index, op))
        return taken

    def answer(self, index: int, op: Op, outcome: Outcome) -> list[Op]:
        """Take what one piece gave; returns operations that clear up after one that failed in the middle."""
        clearing: list[Op] = []
        if not isinstance(outcome, torch.Tensor):
            self.outcomes[index] = outcome
            if self.work and self.work[0][0] == index:
                self.work.popleft()
            if index in self.rows:
                # Part of it was fed, so it did have an effect. Without the sequence the owner starts it anew.
                clearing.append(Close(op.sequence))
            return clearing
        parts = self.rows.setdefault(index, [])
        parts.append(outcome)
        if not self.work or self.work[0][0] != index:
            self.outcomes[index] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return clearing

    def spent(self, compute: float, travel: float) -> None:
        """A step with a piece of it took so many seconds in the expert and on the way."""
        self.compute += compute
        self.travel += travel

    def finish(self, name: str, now: float) -> None:
        """Tell the owner, once nothing is left to do."""
        if self.work or self.results.done():
            return
        if self.watch is not None:
            waited = now - self.arrived - self.compute - self.travel
            self.watch.forward(name, max(0.0, waited), self.compute, self.travel, self.tokens)
        self.results.set_result([outcome for outcome in self.outcomes if outcome is not None])

    def abandon(self, error: ExpertUnavailable) -> None:
        """Tell the owner that nothing more will come, and let go of what came."""
        if not self.results.done():
            self.results.set_exception(error)
        self.rows.clear()
        self.outcomes.clear()


async def at_once() -> None:
    """Nobody to wait for."""


_Piece = tuple[_Submission, int, Op]
"""What a step has of a submission: an operation, or part of one, with its index."""


def _split(op: Open | Extend, count: int) -> tuple[Op, Op | None]:
    """The operation on the first `count` tokens, and what is left of it."""
    if count >= len(op.tokens):
        return op, None
    head, tail = op.tokens[:count], op.tokens[count:]
    rows = Rows.ALL if op.rows is Rows.ALL else Rows.NONE
    return type(op)(op.sequence, head, rows), Extend(op.sequence, tail, op.rows)


class ExpertScheduler:
    """Batches the operations of concurrent requests; one per connection, within a running event loop.

    There are no timers: an idle expert gets what is pending at once, a busy one gets everything that arrived
    meanwhile in its next step. Short submissions, which are texts being written, all take part in every step. Long
    ones, which are prompts being read, share `chunk` tokens a step, in turns, so that what they add to a step is
    bounded. They get more where more of them wait than there are texts to hold up: a chunk for each prompt that a
    text being written has to bear, up to `MOST_CHUNKS`, and as many when no text is being written.
    """

    def __init__(
        self,
        connection: StepRunner,
        *,
        chunk: int = 512,
        writers: Callable[[], int] = lambda: 1,
        settle: Callable[[], Awaitable[None]] = at_once,
        step_seconds: float | None = None,
        ids: Iterable[int] | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`writers`: texts being written, here or with other experts. `settle`: returns when texts that were answered
        have asked again, as `MixingPool.settle`. `step_seconds`: a step that takes longer means the expert hangs.
        `ids`: where sequence ids come from."""
        self.name = connection.spec.name
        self.at_fault = False
        """Whether the expert hung or answered what cannot be right: a new connection would not mend it."""
        self._connection = connection
        self._chunk = chunk
        self._writers = writers
        self._settle = settle
        self._step_seconds = step_seconds
        self._observer = observer or Observer()
        self._ids = iter(itertools.count() if ids is None else ids)
        self._short: deque[_Submission] = deque()
        self._long: deque[_Submission] = deque()
        self._running: list[_Submission] = []
        self._wake = asyncio.Event()
        self._down: ExpertUnavailable | None = None
        self._task = asyncio.create_task(self._run())

    def allocate_sequence(self) -> int:
        """A sequence id that was not used before."""
        return next(self._ids)

    @property
    def queued(self) -> int:
        """Submissions that wait for a step."""
        return len(self._short) + len(self._long)

    @property
    def down(self) -> ExpertUnavailable | None:
        """Why no step is taken any more; None while they are."""
        return self._down

    async def wait_down(self) -> None:
        """Return once no step is taken any more."""
        await asyncio.wait([self._task])

    def submit(self, ops: Sequence[Op], watch: Watch | None = None) -> asyncio.Future[list[Outcome]]:
        """Apply `ops` in order, in steps shared with others; one outcome per operation.

        A future that is cancelled drops what was not sent yet; what was is applied all the same, and `release` then
        frees the sequences in either case. `watch`: the request that is told where its time went.
        Raises BadParameter as `wire.check_ops` does; the future raises ExpertUnavailable if the expert is gone.
        """
        check_ops(ops, self._connection.max_rows)
        return self._enqueue(ops, watch)

    def release(self, sequences: Iterable[int]) -> None:
        """Free sequences after everything submitted before. Never waits and never fails."""
        ops = [Close(sequence) for sequence in sequences]
        if self._down is None and ops:
            self._enqueue(ops, None)

    def fail(self, reason: str, *, at_fault: bool = False) -> None:
        """Give the expert up: nothing is sent to it any more."""
        if self._down is None:
            self.at_fault = at_fault
            self._down = ExpertUnavailable(self.name, reason)
            self._task.cancel()

    async def close(self) -> None:
        """Fail what is pending and stop. The connection stays, but cannot take another step."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _enqueue(self, ops: Sequence[Op], watch: Watch | None) -> asyncio.Future[list[Outcome]]:
        results: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        # A release has nobody who would look at its failure.
        results.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._down is not None:
            results.set_exception(ExpertUnavailable(self.name, self._down.reason))
            return results
        if not ops:
            results.set_result([])
            return results
        tokens = sum(len(op.tokens) for op in ops if isinstance(op, Open | Extend))
        work = deque(enumerate(ops))
        submission = _Submission(work, results, watch, tokens, time.perf_counter(), [None] * len(ops))
        (self._short if tokens <= SHORT else self._long).append(submission)
        self._wake.set()
        return results

    async def _run(self) -> None:
        reason = "the connection was closed"
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while batch := await self._next():
                    await self._step(batch)
                    if self._short or self._long:
                        # Texts that were answered just now belong into the step that would leave without them. After
                        # a turn of the loop they are known to pause.
                        await asyncio.sleep(0)
        except ExpertUnavailable as error:
            reason = error.reason
        except TransportError as error:
            self.at_fault = True
            reason = str(error)
        finally:
            # Also for a cancelled or broken loop: nobody may wait for ever. The error itself is not kept: it holds the
            # frames that it went through, and they the logits of the step.
            self._down = self._down or ExpertUnavailable(self.name, reason)
            for submission in (*self._running, *self._short, *self._long):
                submission.abandon(ExpertUnavailable(self.name, self._down.reason))
            self._running = []
            self._short.clear()
            self._long.clear()

    async def _next(self) -> list[_Piece]:
        """The next step; without what nobody waits for any more."""
        await self._settle()
        self._running = []
        short, rows = self._fill(self._short, None, self._connection.max_rows)
        long, _ = self._fill(self._long, self._chunk * self._chunks(), rows)
        # Short ones first: what one text releases is free for the next one that opens.
        return short + long

    def _chunks(self) -> int:
        """Of prompts in the next step."""
        writers = self._writers()
        return max(1, min(MOST_CHUNKS, -(-len(self._long) // writers))) if writers else MOST_CHUNKS

    def _fill(self, queue: deque[_Submission], tokens: int | None, rows: int) -> tuple[list[_Piece], int]:
        """Pieces from the front of `queue` for at most so many tokens and rows, and the rows that are left."""
        pieces: list[_Piece] = []
        unfinished: list[_Submission] = []
        while queue and (tokens is None or tokens > 0):
            submission = queue.popleft()
            if submission.results.done():
                continue
            taken = submission.take(submission.tokens if tokens is None else tokens, rows)
            if not taken:
                queue.appendleft(submission)
                break
            pieces += [(submission, index, op) for index, op in taken]
            self._running.append(submission)
            rows -= sum(row_count(op) for _, op in taken)
            if tokens is not None:
                tokens -= sum(len(op.tokens) for _, op in taken if isinstance(op, Open | Extend))
            if submission.work:
                unfinished.append(submission)
        # In turns: who had a piece goes behind those that had none.
        queue.extend(unfinished)
        return pieces, rows

    async def _step(self, batch: list[_Piece]) -> None:
        ops = [op for _, _, op in batch]
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._step_seconds):
                result = await self._connection.step(ops)
        except TimeoutError as error:
            self.at_fault = True
            raise ExpertUnavailable(self.name, f"no answer to a step within {self._step_seconds:g} s") from error
        ended = time.perf_counter()
        self._tell(batch, result, ended - started)
        clearing: list[Op] = []
        for at, (submission, index, op) in enumerate(batch):
            refusal = result.errors[at]
            clearing += submission.answer(index, op, result.rows(at) if refusal is None else refusal)
        for submission in self._running:
            submission.spent(result.seconds, max(0.0, ended - started - result.seconds))
            submission.finish(self.name, ended)
        self._running = []
        if clearing:
            self._enqueue(clearing, None)

    def _tell(self, batch: list[_Piece], result: TimedStepResult, seconds: float) -> None:
        self._observer.step(
            Step(
                expert=self.name,
                seconds=seconds,
                compute=result.seconds,
                submissions=len(self._running),
                batch=result.batch_size,
                tokens=sum(len(op.tokens) for _, _, op in batch if isinstance(op, Open | Extend)),
                rows=len(result.logits),
                logits_bytes=result.logits.nbytes,
                inline=result.inline,
            )
        )
