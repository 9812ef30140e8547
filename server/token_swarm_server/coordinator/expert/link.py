"""One expert as the coordinator sees it: the same name through every death and every new connection."""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from token_swarm.decoding.forwards import Outcome
from token_swarm.errors import BadParameter, ExpertFault
from token_swarm.experts.contract import EncodedPrompt, ExpertSpec, ExpertStats, Op, Open, OpError
from token_swarm.mixing.groups import is_distribution
from token_swarm_server.config.settings import ClientTls
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.coordinator.loop import ExpertScheduler, at_once
from token_swarm_server.rpc.errors import ExpertUnavailable, TransportError
from token_swarm_server.telemetry.observer import Observer, Watch

logger = logging.getLogger(__name__)

_ATTEMPT_SECONDS = 5.0
"""For one attempt to reach an expert again; there is always another one."""
_PROBE = "The"
"""What an expert is probed with: a text that every model has seen."""
_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE = 5.0


class LinkState(enum.Enum):
    """Whether an expert takes work."""

    READY = "ready"
    DOWN = "down"


class Reviver(Protocol):
    """What can start an expert's process again: the launcher, for those that it started."""

    def restart(self, name: str, reason: str) -> None:
        """End the process, so that it is started again. An expert that runs elsewhere is left alone."""
        ...

    def trouble(self, name: str) -> str | None:
        """Why the process does not run; None while it does, or runs elsewhere."""
        ...


@dataclass(frozen=True)
class LinkOptions:
    """How to reach an expert and what it is allowed.

    cache: directory for vocabularies. chunk: prompt tokens of a step while other texts run. step_seconds: after which
    it counts as hung. writers, settle: as `ExpertScheduler` takes them. tls: None for no encryption.
    """

    cache: Path
    chunk: int
    step_seconds: float | None = None
    writers: Callable[[], int] = field(default=lambda: 1)
    settle: Callable[[], Awaitable[None]] = at_once
    tls: ClientTls | None = None


class ExpertLink:
    """Keeps a connection to one expert, and makes a new one whenever it is lost. Made by `connect`."""

    def __init__(
        self,
        connection: ExpertConnection,
        address: str,
        options: LinkOptions,
        *,
        reviver: Reviver | None = None,
        observer: Observer | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called after every change of `state`."""
        self.name = connection.spec.name
        self.spec = connection.spec
        self.restarts = 0
        """How often the expert came back."""
        self._address = address
        self._options = options
        self._reviver = reviver
        self._observer = observer or Observer()
        self._changed = changed
        self._ids = itertools.count()
        self._reason = ""
        self._probe_tokens: tuple[int, ...] = ()
        self._probing: asyncio.Task[bool] | None = None
        self._ready = asyncio.Event()
        self._up(connection)
        self._keeper = asyncio.create_task(self._keep())

    @classmethod
    async def connect(
        cls,
        name: str,
        address: str,
        options: LinkOptions,
        *,
        wait_seconds: float = 60.0,
        reviver: Reviver | None = None,
        observer: Observer | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> ExpertLink:
        """Connect for the first time. Raises as `ExpertConnection.connect` does."""
        connection = await ExpertConnection.connect(
            address, name, cache=options.cache, wait_seconds=wait_seconds, tls=options.tls
        )
        return cls(connection, address, options, reviver=reviver, observer=observer, changed=changed)

    @property
    def state(self) -> LinkState:
        """Whether the expert takes work now."""
        return LinkState.READY if self._ready.is_set() and self._scheduler.down is None else LinkState.DOWN

    @property
    def reason(self) -> str:
        """Why it does not; empty while it does."""
        if self.state is LinkState.READY:
            return ""
        trouble = self._reviver.trouble(self.name) if self._reviver is not None else None
        return trouble or self._reason or "it was lost"

    @property
    def queued(self) -> int:
        """Submissions that wait for a step."""
        return self._scheduler.queued

    def allocate_sequence(self) -> int:
        """A sequence id that was never used on this link."""
        return next(self._ids)

    def submit(self, ops: Sequence[Op], watch: Watch | None = None) -> asyncio.Future[list[Outcome]]:
        """`ExpertScheduler.submit` of the present connection."""
        return self._scheduler.submit(ops, watch)

    def release(self, sequences: Iterable[int]) -> None:
        """`ExpertScheduler.release` of the present connection: an expert that is lost has freed them."""
        self._scheduler.release(sequences)

    async def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """`ExpertConnection.encode` of the present connection."""
        return await self._present().encode(prompt, chat=chat)

    async def tokenize(self, text: str) -> tuple[int, ...]:
        """`ExpertConnection.tokenize` of the present connection."""
        return await self._present().tokenize(text)

    async def stats(self) -> ExpertStats:
        """`ExpertConnection.stats` of the present connection."""
        return await self._present().stats()

    def _present(self) -> ExpertConnection:
        if self.state is LinkState.DOWN:
            raise ExpertUnavailable(self.name, self.reason)
        return self._connection

    async def wait_ready(self) -> None:
        """Return once the expert takes work."""
        while self.state is LinkState.DOWN:
            # That the expert is gone may be known before the link has put its connection away.
            await (asyncio.sleep(0) if self._ready.is_set() else self._ready.wait())

    async def probe(self) -> bool:
        """Whether the expert's logits after a short fixed text, in a sequence of its own, are a distribution.

        Callers at the same time share one answer. Raises ExpertUnavailable.
        """
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._answers_well())
            # The callers may all have been cancelled.
            self._probing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._probing)

    async def _answers_well(self) -> bool:
        if not self._probe_tokens:
            try:
                self._probe_tokens = (await self.encode(_PROBE)).tokens
            except (BadParameter, ExpertFault):
                # A vocabulary that cannot write it: its first token that writes anything.
                texts = self.spec.vocabulary.token_bytes
                self._probe_tokens = (next(token for token, text in enumerate(texts) if text),)
        sequence = self.allocate_sequence()
        try:
            (outcome,) = await self.submit([Open(sequence, self._probe_tokens)])
        finally:
            self.release([sequence])
        # A refusal says nothing about logits.
        return isinstance(outcome, OpError) or is_distribution(self.spec, outcome[0])

    def blame(self, reason: str, restarts: int) -> None:
        """The expert answered what cannot be right: it is started again, or at least connected anew.

        `restarts`: as it was when the expert was asked; its successor is not to blame.
        """
        if restarts != self.restarts or self.state is LinkState.DOWN:
            return
        logger.error("expert %s is given up: %s", self.name, reason)
        self._scheduler.fail(reason, at_fault=True)

    async def close(self) -> None:
        """Disconnect for good; running texts fail."""
        self._keeper.cancel()
        if self._probing is not None:
            self._probing.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        await self._scheduler.close()
        await self._connection.close()

    def _up(self, connection: ExpertConnection) -> None:
        self._connection = connection
        self._scheduler = ExpertScheduler(
            connection,
            chunk=self._options.chunk,
            writers=self._options.writers,
            settle=self._options.settle,
            step_seconds=self._options.step_seconds,
            ids=self._ids,
            observer=self._observer,
        )
        self._ready.set()
        self._observer.expert_changed(self.name, LinkState.READY.value)
        self._changed()

    async def _keep(self) -> None:
        while True:
            lost = asyncio.create_task(self._connection.wait_lost())
            down = asyncio.create_task(self._scheduler.wait_down())
            try:
                await asyncio.wait({lost, down}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
                down.cancel()
            await self._lose()
            await self._reconnect()

    async def _lose(self) -> None:
        """Put the present connection away."""
        scheduler = self._scheduler
        scheduler.fail("the connection was lost")
        self._reason = scheduler.down.reason if scheduler.down is not None else ""
        self._ready.clear()
        logger.warning("expert %s is down: %s", self.name, self._reason)
        self._observer.expert_changed(self.name, LinkState.DOWN.value, self._reason)
        self._changed()
        if self._reviver is not None and scheduler.at_fault:
            self._reviver.restart(self.name, self._reason)
        await scheduler.close()
        await self._connection.close()

    async def _reconnect(self) -> None:
        """Try until the expert is back, the same as before."""
        pause = _PAUSE_SECONDS
        while True:
            try:
                connection = await ExpertConnection.connect(
                    self._address,
                    self.name,
                    cache=self._options.cache,
                    wait_seconds=_ATTEMPT_SECONDS,
                    tls=self._options.tls,
                    known=self.spec.vocabulary,
                )
            except (ExpertUnavailable, TransportError, BadParameter) as error:
                # BadParameter: a certificate that is being replaced just now.
                self._reason = error.reason if isinstance(error, ExpertUnavailable) else str(error)
            else:
                if (other := self._differs(connection.spec)) is None:
                    break
                self._reason = other
                await connection.close()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.restarts += 1
        logger.info("expert %s is back", self.name)
        self._up(connection)

    def _differs(self, spec: ExpertSpec) -> str | None:
        """In what the expert is not the one that was lost: texts that it had begun could not go on."""
        for key, old, new in (
            ("vocabulary", self.spec.vocabulary.fingerprint, spec.vocabulary.fingerprint),
            ("tokenizer", self.spec.canonical, spec.canonical),
            ("dtype", self.spec.dtype, spec.dtype),
        ):
            if old != new:
                return f"it came back with another {key} ({new}, was {old}); restart the coordinator to accept it"
        return None
