"""Runs a utility in a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.evaluators.closing import ClosedAtExit
from token_swarm.search.evaluators.remade import packed
from token_swarm.search.evaluators.serial import judge, pieces
from token_swarm.search.utility import Scores, Utility, UtilityUnavailable

# What this process of a pool has received: the file and the utility in it.
_received: tuple[str, Utility] | None = None


class ProcessPoolEvaluator(ClosedAtExit):
    """The mixtures are divided among `processes`, each of which reads the utility once.

    They are started afresh (spawned), so a script that uses it needs the usual `if __name__ == "__main__":`. A context
    manager; `close` ends the processes. What a utility counts (the costs of a judge) is counted in its process.
    """

    def __init__(self, processes: int, *, threads: int = 1) -> None:
        """threads: torch's threads in each process. Raises BadParameter below 1."""
        for name, value in (("processes", processes), ("threads", threads)):
            if value < 1:
                raise BadParameter(name, value, "an integer >= 1")
        self._processes, self._threads = processes, threads
        self._pool: ProcessPoolExecutor | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._sent: Utility | None = None
        self._count = 0

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._folder is not None:
            self._folder.cleanup()
        self._pool = self._folder = self._sent = None

    def evaluate(self, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Evaluator.evaluate`. UtilityUnavailable is passed on, and raised when a process dies.

        Raises BadParameter for a utility that cannot be pickled.
        """
        if not mixtures:
            return judge(utility, mixtures, items)
        path = self._send(utility)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(self._threads,),
            )
        try:
            waiting = [self._pool.submit(_evaluate, path, own, items) for own in pieces(mixtures, self._processes)]
            return Scores.join([future.result() for future in waiting])
        except BrokenProcessPool as error:
            self.close()
            raise UtilityUnavailable(f"a process of the pool died while it judged {utility.name}: {error}") from error

    def _send(self, utility: Utility) -> str:
        """The file from which every process reads the utility."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="token-swarm-")
        if utility is not self._sent:
            data = packed(utility)
            self._count += 1
            (Path(self._folder.name) / str(self._count)).write_bytes(data)
            self._sent = utility
        return f"{self._folder.name}/{self._count}"


def _evaluate(path: str, mixtures: Sequence[Mixture], items: Sequence[int] | None) -> Scores:
    global _received
    if _received is None or _received[0] != path:
        _received = path, pickle.loads(Path(path).read_bytes())
    return judge(_received[1], mixtures, items)
