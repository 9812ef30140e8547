"""Runs texts and scores against remote experts: the coordinator without its gRPC face."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from token_swarm.cores import available_cores
from token_swarm.decoding.decoder import ExpertUse, Finish
from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.decoding.score import Score
from token_swarm.errors import BadParameter
from token_swarm.mixing.groups import Unit
from token_swarm_server.config.settings import CoordinatorSettings, Settings
from token_swarm_server.coordinator.admission import Admission
from token_swarm_server.coordinator.expert.link import ExpertLink, LinkOptions, LinkState, Reviver
from token_swarm_server.coordinator.mixing_pool import MixingPool
from token_swarm_server.coordinator.recovery import Members, Prompt
from token_swarm_server.coordinator.scoring import score_text
from token_swarm_server.coordinator.text import Generation
from token_swarm_server.telemetry.breakdown import ExpertTime, Parts
from token_swarm_server.telemetry.observer import Watch, Work
from token_swarm_server.telemetry.sinks import Observability

_MOST_THREADS = 8
"""By default. What is left of mixing beside the kernels holds the interpreter, one text at a time."""


@dataclass(frozen=True)
class Finished:
    """The end of a text. Times in seconds; `first_byte` is None when no text was shown.

    parts, forwards: what the total is made of. dropped: experts that failed and that it went on without. reopened: how
    often one was lost and read the text again.
    """

    finish: Finish
    unit: Unit
    queue: float
    first_byte: float | None
    total: float
    parts: Parts
    forwards: Mapping[str, ExpertTime]
    dropped: tuple[str, ...] = ()
    reopened: int = 0


class Engine:
    """The experts, and the texts that are written with them. Made by `connect`."""

    def __init__(
        self,
        links: Mapping[str, ExpertLink],
        ensemble: Ensemble,
        limits: CoordinatorSettings,
        observer: Observability,
        pool: MixingPool,
    ) -> None:
        """`pool` is closed with the engine. Raises BadParameter for limits that the experts cannot keep."""
        self.ensemble = ensemble
        self.links = dict(links)
        self.observer = observer
        self.pool = pool
        self.running = 0
        """Texts that hold KV, with those that are only scored."""
        self.texts: set[Generation] = set()
        """Those that are generated."""
        self.changed: Callable[[], None] = lambda: None
        """Called whenever an expert was lost or came back."""
        self._lanes = limits.lanes_per_expert
        self._draft_rows = limits.draft_rows
        self._wait_seconds = limits.wait_seconds
        sequences = {name: spec.max_sequences for name, spec in ensemble.specs.items()}
        for name, count in sequences.items():
            if count < self._lanes:
                raise BadParameter(f"experts.{name}.max_sequences", count, f"at least lanes_per_expert = {self._lanes}")
        self.quorum = len(self.links) if limits.quorum is None else limits.quorum
        if self.quorum > len(self.links):
            raise BadParameter("coordinator.quorum", self.quorum, f"at most the {len(self.links)} experts there are")
        self.admission = Admission(sequences, limits.max_queue, limits.max_queue_bytes)

    @classmethod
    async def connect(
        cls,
        endpoints: Mapping[str, str],
        settings: Settings,
        *,
        reviver: Reviver | None = None,
        observer: Observability | None = None,
        wait_seconds: float = 60.0,
    ) -> Engine:
        """Connect to every expert at once. `endpoints`: gRPC address by name.

        Raises ExpertUnavailable or TransportError, and BadParameter for settings that the experts contradict; it then
        leaves no connection.
        """
        observer = observer or Observability(settings)
        pool = MixingPool(settings.coordinator.mixing_threads or min(_MOST_THREADS, len(available_cores())))
        made: list[Engine] = []

        def writers() -> int:
            return made[0].writers if made else 0

        def changed() -> None:
            if made:
                made[0].changed()

        tasks = {}
        for name, address in endpoints.items():
            expert = settings.experts[name]
            options = LinkOptions(
                settings.cache / "vocabularies", expert.chunk, expert.step_seconds, writers, pool.settle, expert.tls
            )
            connecting = ExpertLink.connect(
                name,
                address,
                options,
                wait_seconds=wait_seconds,
                reviver=reviver,
                observer=observer,
                changed=changed,
            )
            tasks[name] = asyncio.ensure_future(connecting)
        try:
            links = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
            specs = {name: link.spec for name, link in links.items()}
            ensemble = await asyncio.to_thread(Ensemble.of, specs, settings.cache / "tries")
            made.append(cls(links, ensemble, settings.coordinator, observer, pool))
        except BaseException:
            for task in tasks.values():
                task.cancel()
            for result in await asyncio.gather(*tasks.values(), return_exceptions=True):
                if isinstance(result, ExpertLink):
                    await result.close()
            pool.close()
            raise
        return made[0]

    @property
    def ready(self) -> int:
        """Experts that take work now."""
        return sum(link.state is LinkState.READY for link in self.links.values())

    @property
    def writers(self) -> int:
        """Texts whose prompt has been read."""
        return sum(text.being_written for text in self.texts)

    def _drafts(self) -> int:
        """Tokens that each text may draft now: a step has so much room, and every text needs a token of it."""
        return max(0, self._draft_rows // max(1, self.writers) - 1)

    async def generate(
        self, prompt: Prompt, request: DecodeRequest, watch: Watch
    ) -> AsyncGenerator[str | Finished, None]:
        """Text as it becomes complete, then one `Finished`. However it is left, the KV is freed.

        Raises BadParameter, UnknownName, QueueFull, ExpertUnavailable, ExpertFault.
        """
        prompt.mixture.require_known(self.links)
        size = len(prompt.text.encode())
        self.admission.require_room(prompt.mixture.active.keys(), self._lanes, size)
        members = Members(self.links, prompt, self._wait_seconds, watch)
        text = Generation(
            self.ensemble,
            members,
            request,
            allocate=self._allocate,
            lanes=self._lanes,
            drafts=self._drafts,
            pool=self.pool,
            watch=watch,
        )
        await text.open()
        opened = time.perf_counter()
        async with self.admission.hold(members.names, self._lanes, size):
            watch.admitted()
            watch.parts.admission += time.perf_counter() - opened
            self.running += 1
            self.texts.add(text)
            try:
                async with contextlib.aclosing(text.pieces()) as pieces:
                    async for piece in pieces:
                        yield piece
            finally:
                self.running -= 1
                self.texts.discard(text)
                watch.worked(_work(text.use, members))
                text.close()
        finish = text.finish
        watch.finished(finish.reason.value)
        admitted = watch.admitted_at or watch.started_at
        yield Finished(
            finish=finish,
            unit=text.kind,
            queue=admitted - watch.started_at,
            first_byte=None if watch.first_text_at is None else watch.first_text_at - watch.started_at,
            total=time.perf_counter() - watch.started_at,
            parts=watch.parts,
            forwards=watch.experts,
            dropped=tuple(members.dropped),
            reopened=members.reopened,
        )

    async def score(self, prompt: Prompt, text: str, watch: Watch, stride: int | None = None) -> Score:
        """Log-probability of `text` after the prompt. stride: see `plan_windows`. Raises as `generate` does."""
        prompt.mixture.require_known(self.links)
        size = len(prompt.text.encode()) + len(text.encode())
        self.admission.require_room(prompt.mixture.active.keys(), 1, size)
        members = Members(self.links, prompt, self._wait_seconds, watch)
        async with self.admission.hold(members.names, 1, size):
            watch.admitted()
            watch.planned(members.mixture.rule.value, Unit.BYTE.value, members.mixture.active)
            self.running += 1
            try:
                return await score_text(self.ensemble, members, text, self._allocate, self.pool, stride)
            finally:
                self.running -= 1

    async def close(self) -> None:
        """Disconnect from every expert; running texts fail."""
        for link in self.links.values():
            await link.close()
        self.pool.close()

    def _allocate(self, expert: str) -> int:
        return self.links[expert].allocate_sequence()


def _work(use: Mapping[str, ExpertUse], members: Members) -> Work:
    """What was done for a text, however it ended."""
    return Work(
        tokens={name: own.tokens for name, own in use.items()},
        shares={name: own.share for name, own in use.items()},
        drafted={name: own.drafted for name, own in use.items()},
        accepted={name: own.accepted for name, own in use.items()},
        dropped=tuple(members.dropped),
        reopened=members.reopened,
    )
