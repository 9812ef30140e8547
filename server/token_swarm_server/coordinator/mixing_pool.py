"""Where texts are mixed: one alone in the event loop, several at once in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

_T = TypeVar("_T")


class Pause:
    """The time in which a text has been answered and has not asked for its next forwards. To be ended by its text."""

    def __init__(self, pauses: set[asyncio.Future[None]]) -> None:
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pauses = pauses
        pauses.add(self._over)

    def end(self) -> None:
        """The text has asked, has ended, or waits for something else. Ending twice does nothing."""
        if not self._over.done():
            self._pauses.discard(self._over)
            self._over.set_result(None)


class _Waiting(NamedTuple):
    """A job that has not begun, and where its result goes."""

    job: Callable[[], Any]
    done: asyncio.Future[Any]


_Result: TypeAlias = tuple[Any, Exception | None]
"""What a job returned or raised."""


class MixingPool:
    """Runs what texts compute between two forwards. The C++ kernels let other threads run.

    An expert answers a whole batch of texts at once, and is idle until they ask again: mixing them one after the other
    would be a pause for all of them. A text that is alone is not handed to a thread, which would take longer to begin.
    """

    def __init__(self, threads: int) -> None:
        """`threads`: texts that are mixed at the same time; with 1 no thread is made."""
        self._threads = (
            # What torch itself computes is small here: threads of threads would only get into each other's way.
            ThreadPoolExecutor(threads, "mixing", initializer=torch.set_num_threads, initargs=(1,))
            if threads > 1
            else None
        )
        self._workers = threads
        self._waiting: list[_Waiting] = []
        self._mixing = 0
        self._pauses: set[asyncio.Future[None]] = set()

    async def mix(self, job: Callable[[], _T]) -> _T:
        """What `job` returns or raises. A caller that is cancelled waits until the job has ended, for what it works on
        must not be freed before."""
        return await _finished(self.begin(job))

    def begin(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Run a job that keeps what it works on: nobody has to wait for it. The future is not to be cancelled."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()
        if not self._waiting:
            # All texts that one step answered get here within one turn of the loop.
            loop.call_soon(self._start)
        self._waiting.append(_Waiting(job, done))
        self._mixing += 1
        return done

    async def aside(self, job: Callable[[], _T]) -> _T:
        """As `mix`, for a job that takes long: it never runs in the event loop."""
        return await _finished(asyncio.get_running_loop().run_in_executor(self._threads, job))

    def pause(self) -> Pause:
        """A text has all answers that it waited for."""
        return Pause(self._pauses)

    async def settle(self) -> None:
        """Return when the texts that pause now have asked for their next forwards; at once if there are none.

        Those that begin to pause meanwhile are not waited for: other experts answer at other times.
        """
        if self._pauses:
            await asyncio.wait(set(self._pauses))

    def close(self) -> None:
        """Free the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    def _start(self) -> None:
        """Begin all that is waiting."""
        waiting, self._waiting = self._waiting, []
        if self._threads is None or self._mixing == 1:
            self._end(waiting, _run(waiting))
            return
        loop = asyncio.get_running_loop()
        # A share for each thread: they, and the event loop, are woken once.
        for part in _shares(waiting, self._workers):
            running = loop.run_in_executor(self._threads, _run, part)
            running.add_done_callback(lambda ended, part=part: self._end(part, ended.result()))  # type: ignore[misc]

    def _end(self, jobs: Sequence[_Waiting], results: Sequence[_Result]) -> None:
        self._mixing -= len(jobs)
        for one, (value, error) in zip(jobs, results, strict=True):
            if error is None:
                one.done.set_result(value)
            else:
                one.done.set_exception(error)


def _shares(jobs: Sequence[_Waiting], count: int) -> list[Sequence[_Waiting]]:
    """At most `count` parts, as even as can be."""
    bounds = [len(jobs) * part // count for part in range(count + 1)]
    return [jobs[first:last] for first, last in pairwise(bounds) if first < last]


def _run(jobs: Sequence[_Waiting]) -> list[_Result]:
    results: list[_Result] = []
    for one in jobs:
        try:
            results.append((one.job(), None))
        except Exception as error:
            results.append((None, error))
    return results


async def _finished(done: asyncio.Future[_T]) -> _T:
    """The result, once it is there, even if the caller is cancelled before."""
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        done.exception()
        raise cancelled
    return done.result()
