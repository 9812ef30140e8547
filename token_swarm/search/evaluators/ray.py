"""Runs a utility on a Ray cluster: `pip install token-swarm[ray]`."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.evaluators.closing import ClosedAtExit
from token_swarm.search.evaluators.remade import packed
from token_swarm.search.evaluators.serial import judge, pieces
from token_swarm.search.utility import Scores, Utility, UtilityUnavailable


class RayEvaluator(ClosedAtExit):
    """The mixtures are divided among `workers` actors, which are sent the utility once.

    Joins the cluster of this process when there is one; otherwise the one at `address`, or starts one on this machine
    that ends with `close`. A utility that holds models is sent as a `Remade`.
    """

    def __init__(
        self,
        workers: int,
        *,
        address: str | None = None,
        cpus_per_worker: float = 1,
        gpus_per_worker: float = 0,
        threads: int = 1,
        **options: Any,
    ) -> None:
        """threads: torch's threads in each worker; options: for `ray.init`.

        Raises BadParameter for less than one worker, ImportError with what to install where Ray is missing.
        """
        if workers < 1:
            raise BadParameter("workers", workers, "an integer >= 1")
        try:
            import ray
        except ImportError as error:
            raise ImportError("evaluating on a cluster needs Ray: pip install 'token-swarm[ray]'") from error
        self._ray: Any = ray
        self._workers, self._threads = workers, threads
        self._resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(address=address, log_to_driver=False, **options)
        self._actors: list[Any] = []
        self._sent: Utility | None = None

    def close(self) -> None:
        """End the actors, and the connection to the cluster if this object made it."""
        self._end_actors()
        if self._own:
            self._ray.shutdown()

    def _end_actors(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._sent = [], None

    def evaluate(self, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Evaluator.evaluate`. UtilityUnavailable is passed on, and raised when an actor dies.

        Raises BadParameter for a utility that cannot be pickled.
        """
        if not mixtures:
            return judge(utility, mixtures, items)
        actors = self._actors_for(utility)
        try:
            waiting = [
                actor.evaluate.remote(own, items)
                for actor, own in zip(actors, pieces(mixtures, len(actors)), strict=False)
            ]
            return Scores.join(self._ray.get(waiting))
        except self._ray.exceptions.RayTaskError as error:
            # Ray's own class wraps what the worker raised.
            if isinstance(error.cause, UtilityUnavailable):
                raise error.cause from error
            raise
        except self._ray.exceptions.RayActorError as error:
            self._end_actors()
            raise UtilityUnavailable(f"an actor died while it judged {utility.name}: {error}") from error

    def _actors_for(self, utility: Utility) -> list[Any]:
        if utility is not self._sent:
            data = self._ray.put(packed(utility))
            if not self._actors:
                worker = self._ray.remote(**self._resources)(_Worker)
                self._actors = [worker.remote(self._threads) for _ in range(self._workers)]
            # An actor does what it is told in order, so nobody waits for this.
            for actor in self._actors:
                actor.receive.remote(data)
            self._sent = utility
        return self._actors


class _Worker:
    """One actor: holds the utility."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._utility: Utility | None = None

    def receive(self, data: bytes) -> None:
        self._utility = pickle.loads(data)

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None) -> Scores:
        if self._utility is None:
            raise RuntimeError("the utility could not be received")
        return judge(self._utility, mixtures, items)
