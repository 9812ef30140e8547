"""The experts of one text: what is asked of them, what they answer, and what is done about those that fail."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from token_swarm.decoding.forwards import Calls, Outcome
from token_swarm.errors import BadHistory, BadLogits
from token_swarm.experts.contract import Close, EncodedPrompt
from token_swarm.particle import Mixture
from token_swarm_server.coordinator.expert.link import ExpertLink, LinkState
from token_swarm_server.rpc.errors import ExpertUnavailable
from token_swarm_server.telemetry.observer import Watch

_T = TypeVar("_T")
_PAUSE_SECONDS = 0.02
_MAX_FAULTS = 3
"""Abort a request after this many steps with invalid logits."""


class OnFailure(enum.Enum):
    """What happens to a text when one of its experts dies, hangs or answers nonsense."""

    WAIT = "wait"
    FAIL = "fail"
    DROP = "drop"


@dataclass(frozen=True)
class Prompt:
    """What is asked. `mixture` is what the request wants, before any expert is dropped."""

    text: str
    chat: bool
    mixture: Mixture
    on_failure: OnFailure = OnFailure.WAIT


@dataclass
class Round:
    """Operations under way, by expert. Times: when they were submitted, when text that was complete before had been
    sent, and when all were answered; 0 while there is none."""

    futures: Mapping[str, asyncio.Future[list[Outcome]]]
    asked_at: float
    sent_at: float = 0.0
    answered_at: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether every expert has answered, or was lost."""
        return all(future.done() for future in self.futures.values())

    def cancel(self) -> None:
        """Drop what was not sent to an expert yet."""
        for future in self.futures.values():
            future.cancel()


class Members:
    """The experts of one text, and what is done about those that fail."""

    def __init__(self, links: Mapping[str, ExpertLink], prompt: Prompt, wait_seconds: float, watch: Watch) -> None:
        self.mixture = prompt.mixture
        self.dropped: list[str] = []
        self.reopened = 0
        self._links = links
        self._prompt = prompt
        self._wait_seconds = wait_seconds
        self._watch = watch
        self._asked: dict[str, int] = {}  # by expert: its restarts when it was asked last
        self._faults = 0
        self._reread: dict[str, int] = {}  # by expert: bytes of the text at which it read the text anew

    @property
    def names(self) -> list[str]:
        """Experts that the text is still written with."""
        return list(self.mixture.active)

    async def each(self, call: Callable[[ExpertLink], Awaitable[_T]]) -> dict[str, _T]:
        """What `call` gives for every expert, all at once; one that is lost meanwhile is waited for or dropped."""
        given: dict[str, _T] = {}
        while missing := [name for name in self.names if name not in given]:
            await self.settle([name for name in missing if self._links[name].state is LinkState.DOWN])
            missing = [name for name in missing if name in self.mixture.active]
            results = await asyncio.gather(*(call(self._links[name]) for name in missing), return_exceptions=True)
            for name, result in zip(missing, results, strict=True):
                if isinstance(result, ExpertUnavailable):
                    await self.settle([name])
                elif isinstance(result, BaseException):
                    raise result
                else:
                    given[name] = result
        return {name: given[name] for name in self.names}

    async def encode(self) -> dict[str, EncodedPrompt]:
        """The prompt as each expert reads it."""
        return await self.each(lambda link: link.encode(self._prompt.text, chat=self._prompt.chat))

    def ask(self, calls: Calls) -> Round:
        """Submit operations to every expert, all at the same time."""
        self._asked.update({name: self._links[name].restarts for name in calls})
        asked_at = time.perf_counter()
        return Round({name: self._links[name].submit(ops, self._watch) for name, ops in calls.items()}, asked_at)

    async def answers(self, round_: Round) -> dict[str, list[Outcome]]:
        """Wait for what comes back; see `outcomes`. A caller that is cancelled drops what was not sent yet."""
        try:
            await asyncio.wait(round_.futures.values())
        except asyncio.CancelledError:
            round_.cancel()
            raise
        self.round_ended(round_)
        return self.outcomes(round_)

    def round_ended(self, round_: Round) -> None:
        """Every expert has answered, or was lost."""
        self._watch.round_ended(round_.futures, self.names, round_.asked_at, round_.sent_at)
        round_.answered_at = time.perf_counter()

    @staticmethod
    def outcomes(round_: Round) -> dict[str, list[Outcome]]:
        """What came back in a round that is answered; experts that were lost have no outcomes."""
        outcomes: dict[str, list[Outcome]] = {}
        for name, future in round_.futures.items():
            try:
                outcomes[name] = future.result()
            except ExpertUnavailable:
                continue
        return outcomes

    async def examine(self, fault: BadLogits, length: int) -> tuple[list[str], list[str]]:
        """What is to be done about invalid logits after `length` bytes of the text: the experts that are lost, and
        those that are to read the text anew.

        An expert is started again only if its logits after a text that nobody chose are invalid too. One that answers
        that text well reads this one again. If that gives the same, the text is what it cannot take: the request goes
        on without the expert where it asks for that, or ends. Raises BadHistory, and `fault` when there are too many.
        """
        self._faults += 1
        if self._faults > _MAX_FAULTS:
            raise fault
        sound = await asyncio.gather(*(self._is_sound(name) for name in fault.experts))
        lost, anew = [], []
        for name, answers in zip(fault.experts, sound, strict=True):
            if not answers:
                self._links[name].blame(str(fault), self._asked.get(name, 0))
                lost.append(name)
            elif self._reread.get(name) != length:
                self._reread[name] = length
                anew.append(name)
            elif self._prompt.on_failure is OnFailure.DROP and set(self.names) - {name, *lost}:
                lost.append(name)
            else:
                raise BadHistory(name, fault.reason)
        return lost, anew

    async def _is_sound(self, name: str) -> bool:
        link = self._links[name]
        try:
            return link.restarts == self._asked.get(name, 0) and await link.probe()
        except ExpertUnavailable:
            return False

    async def settle(self, lost: Sequence[str]) -> None:
        """Do what the request asks for about experts that were lost; on return the others, or all, take work.

        Raises ExpertUnavailable if the text cannot go on.
        """
        if not lost:
            return
        if self._prompt.on_failure is OnFailure.DROP and set(self.names) - set(lost):
            self.mixture = self.mixture.without(lost)
            self.dropped += lost
            return
        reasons = {name: self._links[name].reason for name in lost}
        if self._prompt.on_failure is OnFailure.FAIL:
            raise ExpertUnavailable(lost[0], reasons[lost[0]])
        try:
            async with asyncio.timeout(self._wait_seconds):
                # An expert that takes work and refuses calls all the same is not asked again at once.
                await asyncio.sleep(_PAUSE_SECONDS)
                for name in lost:
                    await self._links[name].wait_ready()
        except TimeoutError as error:
            name = next(name for name in lost if self._links[name].state is LinkState.DOWN)
            reason = self._links[name].reason or reasons[name]
            raise ExpertUnavailable(name, f"it did not come back within {self._wait_seconds:g} s: {reason}") from error

    def release(self, calls: Calls) -> None:
        """Free the sequences that `calls` closes. Never waits."""
        for name, ops in calls.items():
            self._links[name].release(op.sequence for op in ops if isinstance(op, Close))
