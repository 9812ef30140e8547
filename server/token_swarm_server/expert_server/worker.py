"""The one thread that runs an expert's model, and the queue before it that all streams share."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from dataclasses import dataclass, field

from token_swarm.experts.contract import (
    Close,
    Expert,
    Extend,
    Fork,
    Op,
    Open,
    OpError,
    OpErrorKind,
    RowWriter,
    StepResult,
    Truncate,
)
from token_swarm.experts.ops import row_count
from token_swarm.v1 import expert_pb2
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.expert_protocol import shared_memory as transport

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Stream:
    """One caller. Sequence ids are its own: `base` sets them apart from those of other streams.

    `live`: ids, as the caller knows them, that may hold a sequence. `segment`: shared memory, if any.
    """

    base: int
    live: set[int] = field(default_factory=set)
    segment: transport.SegmentWriter | None = None


@dataclass(eq=False)
class _Job:
    """A step of one stream that waits for the model; `reply` is resolved with the answer. `slot`: of the stream's
    segment, for the logits; None for the message."""

    stream: Stream
    number: int
    ops: tuple[Op, ...]
    slot: int | None
    reply: asyncio.Future[expert_pb2.StepReply]

    @property
    def rows(self) -> int:
        """Logit rows that the step asks for."""
        return sum(map(row_count, self.ops))


def _move(op: Op, base: int) -> Op:
    """The operation on sequence ids that are `base` higher."""
    match op:
        case Open(sequence, tokens, rows):
            return Open(base + sequence, tokens, rows)
        case Extend(sequence, tokens, rows):
            return Extend(base + sequence, tokens, rows)
        case Fork(sequence, new):
            return Fork(base + sequence, base + new)
        case Truncate(sequence, length):
            return Truncate(base + sequence, length)
        case Close(sequence):
            return Close(base + sequence)


def _named(error: OpError | None, op: Op, base: int) -> OpError | None:
    """The error in the caller's own sequence ids."""
    if error is None or base == 0:
        return error
    message = error.message
    for sequence in {op.sequence, op.new} if isinstance(op, Fork) else {op.sequence}:
        message = message.replace(str(base + sequence), str(sequence))
    return OpError(error.kind, message)


def _resolve(jobs: list[_Job], replies: list[expert_pb2.StepReply]) -> None:
    for job, reply in zip(jobs, replies, strict=True):
        if not job.reply.done():
            job.reply.set_result(reply)


def _fail(jobs: list[_Job], exception: Exception) -> None:
    for job in jobs:
        if not job.reply.done():
            job.reply.set_exception(exception)


class ExpertWorker:
    """Runs the steps of all streams; steps that wait at the same moment become one step of the expert.

    Its methods are for the event loop's thread. The model has a thread of its own with a plain queue before it:
    through a task and an executor, a step would change threads and wake the loop twice as often.
    """

    def __init__(self, expert: Expert, max_rows: int) -> None:
        """`max_rows`: most logit rows of steps that are merged."""
        self._expert = expert
        self._max_rows = max_rows
        self._queue: queue.SimpleQueue[_Job | Stream | None] = queue.SimpleQueue()
        # Taken from the queue, but not part of the step that took it.
        self._next: list[_Job | Stream | None] = []
        self._streams = 0
        self.stats = expert.stats()
        """What the expert held after the latest step."""
        self._thread = threading.Thread(target=self._run, name="expert", daemon=True)

    def start(self) -> None:
        """Begin to take steps."""
        self._thread.start()

    async def stop(self) -> None:
        """Finish what is queued and end the thread. No stream may be open."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def queued(self) -> int:
        """Steps and closed streams that the thread has not taken yet."""
        return self._queue.qsize()

    def open_stream(self) -> Stream:
        """Admit a caller."""
        # Ids on the wire have 64 bits.
        stream = Stream(base=self._streams << 64)
        self._streams += 1
        return stream

    def close_stream(self, stream: Stream) -> None:
        """Free what the stream holds, after the step that may be running. Never waits."""
        self._queue.put(stream)

    async def submit(self, stream: Stream, number: int, ops: tuple[Op, ...], slot: int | None) -> expert_pb2.StepReply:
        """Queue a step and wait for its answer. A step whose caller stops waiting is not run if it can be.

        Raises whatever the expert's own `step` does.
        """
        job = _Job(stream, number, ops, slot, asyncio.get_running_loop().create_future())
        self._queue.put(job)
        return await job.reply

    def _run(self) -> None:
        """The thread: until None comes out of the queue."""
        while (item := self._next.pop() if self._next else self._queue.get()) is not None:
            if isinstance(item, Stream):
                self._free(item)
            else:
                self._answer(self._take(item))

    def _take(self, first: _Job) -> list[_Job]:
        """The jobs that run next: `first` and those after it, as far as their rows fit one step."""
        jobs = [first]
        rows = first.rows
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if not isinstance(item, _Job) or rows + item.rows > self._max_rows:
                self._next.append(item)
                break
            jobs.append(item)
            rows += item.rows
        return [job for job in jobs if not job.reply.done()]

    def _answer(self, jobs: list[_Job]) -> None:
        """Run the jobs, and resolve their replies in the thread of the event loop."""
        if not jobs:
            return
        loop = jobs[0].reply.get_loop()
        try:
            replies = self._step(jobs)
        except Exception as exception:
            loop.call_soon_threadsafe(_fail, jobs, exception)
        else:
            loop.call_soon_threadsafe(_resolve, jobs, replies)

    def _step(self, jobs: list[_Job]) -> list[expert_pb2.StepReply]:
        """Run the jobs as one step of the expert."""
        ops = [_move(op, job.stream.base) for job in jobs for op in job.ops]
        for job in jobs:
            # Before the step: should it fail half-way, everything that it may have opened is freed.
            job.stream.live.update(op.sequence for op in job.ops if isinstance(op, Open))
            job.stream.live.update(op.new for op in job.ops if isinstance(op, Fork))
        started = time.perf_counter()
        result = self._forward(jobs, ops)
        seconds = time.perf_counter() - started
        self.stats = self._expert.stats()
        self._check(result, len(ops))
        batch_size = len({op.sequence for op in ops if isinstance(op, Open | Extend)})
        replies = []
        start = 0
        for job in jobs:
            part = self._part(result, job, start)
            start += len(job.ops)
            self._track(job, part)
            reply = wire.reply_to_proto(job.number, part, seconds=seconds, batch_size=batch_size)
            transport.put_logits(reply, part.logits, job.stream.segment, job.slot)
            replies.append(reply)
        return replies

    def _forward(self, jobs: list[_Job], ops: list[Op]) -> StepResult:
        """The expert's step; the rows of a job that is alone go where its caller reads them."""
        segment, slot = jobs[0].stream.segment, jobs[0].slot
        if len(jobs) > 1 or segment is None or slot is None or not isinstance(self._expert, RowWriter):
            return self._expert.step(ops)
        spec = self._expert.spec
        memory = transport.row_memory(slot, spec.vocabulary.width, spec.dtype, segment)
        return self._expert.step_into(ops, memory)

    def _check(self, result: StepResult, n_ops: int) -> None:
        """Raise RuntimeError unless the expert's answer has the form that it promised."""
        spec = self._expert.spec
        expected = (spec.dtype, spec.vocabulary.width, n_ops, n_ops)
        got = (result.logits.dtype, result.logits.shape[1], len(result.spans), len(result.errors))
        if got != expected:
            raise RuntimeError(
                f"expert {spec.name!r} broke its contract: (dtype, width, spans, errors) is {got}, expected {expected}"
            )

    @staticmethod
    def _part(result: StepResult, job: _Job, start: int) -> StepResult:
        """What belongs to one job: its operations begin at `start`."""
        stop = start + len(job.ops)
        spans = result.spans[start:stop]
        first_row, last_row = (spans[0][0], spans[-1][1]) if spans else (0, 0)
        return StepResult(
            result.logits[first_row:last_row],
            tuple((begin - first_row, end - first_row) for begin, end in spans),
            tuple(
                _named(error, op, job.stream.base) for error, op in zip(result.errors[start:stop], job.ops, strict=True)
            ),
        )

    @staticmethod
    def _track(job: _Job, result: StepResult) -> None:
        """Forget sequences that were closed or never came to be."""
        live = job.stream.live
        for op, error in zip(job.ops, result.errors, strict=True):
            match op:
                case Close(sequence):
                    live.discard(sequence)
                case Open(sequence) if error and error.kind is not OpErrorKind.SEQUENCE_EXISTS:
                    live.discard(sequence)
                case Fork(_, new) if error and error.kind is not OpErrorKind.SEQUENCE_EXISTS:
                    live.discard(new)

    def _free(self, stream: Stream) -> None:
        """Close what a stream left open."""
        try:
            if stream.live:
                self._expert.step([Close(stream.base + sequence) for sequence in sorted(stream.live)])
        except Exception:
            logger.exception("could not free %d sequences of a stream", len(stream.live))
        finally:
            stream.live.clear()
            self.stats = self._expert.stats()
            if stream.segment is not None:
                stream.segment.close()
