"""One text from its prompt to its end, through the death of any of its experts."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from token_swarm.decoding.decoder import Decoder, Finish
from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.forwards import Calls, Outcome
from token_swarm.decoding.request import DecodeRequest
from token_swarm.decoding.score import Score, Scorer, scored_text
from token_swarm.errors import BadLogits
from token_swarm.experts.contract import Close, EncodedPrompt
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.stopwatch import Part, Stopwatch
from token_swarm.mixing.unit import MixingUnit
from token_swarm.particle import Mixture
from token_swarm_server.errors import ExpertUnavailable
from token_swarm_server.expert_link import ExpertLink, LinkState
from token_swarm_server.mixing_pool import MixingPool, Pause
from token_swarm_server.observer import Watch

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_PAUSE_SECONDS = 0.02
_MAX_FAULTS = 3
"""An expert whose logits are no law so often for one text is not to blame for bad luck: the text ends."""
_TURNS = 4
"""Of the event loop: in which a scheduler gets its step on the way."""


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
    """Operations under way, by expert. `asked_at`: when they were submitted; `sent_at`: when text that was complete
    before had been sent, 0 for none."""

    futures: Mapping[str, asyncio.Future[list[Outcome]]]
    asked_at: float
    sent_at: float = 0.0

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
        """What came back; experts that were lost have no outcomes."""
        results = await asyncio.gather(*round_.futures.values(), return_exceptions=True)
        self._watch.round_ended(round_.futures, self.names, round_.asked_at, round_.sent_at)
        outcomes: dict[str, list[Outcome]] = {}
        for name, result in zip(round_.futures, results, strict=True):
            if isinstance(result, BaseException):
                if not isinstance(result, ExpertUnavailable):
                    raise result
            else:
                outcomes[name] = result
        return outcomes

    def blame(self, fault: BadLogits) -> None:
        """An expert's logits are no law."""
        for name in fault.experts:
            self._links[name].blame(str(fault), self._asked.get(name, 0))

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


class Generation:
    """A text that is being written. `open` makes the decoder, `pieces` runs it, `close` frees the KV.

    drafts: says how many tokens may be drafted now.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        members: Members,
        request: DecodeRequest,
        *,
        allocate: Callable[[str], int],
        lanes: int,
        drafts: Callable[[], int],
        pool: MixingPool,
        watch: Watch,
    ) -> None:
        self.members = members
        self.being_written = False
        """Whether its prompt has been read everywhere."""
        self._ensemble = ensemble
        self._request = request
        self._allocate = allocate
        self._lanes = lanes
        self._drafts = drafts
        self._pool = pool
        self._watch = watch
        self._decoder: Decoder | None = None
        self._prompts: dict[str, EncodedPrompt] = {}
        self._round: Round | None = None
        self._ahead: list[asyncio.Future[None]] = []
        self._faults = 0
        self._took = 0.0
        self._pause: Pause | None = None

    @property
    def finish(self) -> Finish:
        """How the text ended."""
        return self._opened.finish

    @property
    def kind(self) -> Unit:
        """What is mixed."""
        return self._opened.unit.kind

    @property
    def _opened(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeError("the text was not opened")
        return self._decoder

    async def open(self) -> None:
        """Encode the prompt everywhere and make the decoder. Raises what `Ensemble.unit` does."""
        parts, started = self._watch.parts, time.perf_counter()
        self._prompts = await self.members.encode()
        parts.encode += time.perf_counter() - started
        self._watch.encoded({name: len(prompt.tokens) for name, prompt in self._prompts.items()})
        started = time.perf_counter()
        unit = await self._build(partial(self._ensemble.unit, self.members.mixture, self._request, self._prompts))
        self._watch.planned(self.members.mixture.rule.value, unit.kind.value, self.members.mixture.active)
        self._decoder = Decoder(unit, self._request, allocate=self._allocate, lanes_per_expert=self._lanes)
        parts.scheduling += time.perf_counter() - started

    async def _build(self, build: Callable[[], MixingUnit]) -> MixingUnit:
        # The first union of a set of vocabularies takes a second to map them: the other streams go on.
        return await asyncio.to_thread(build) if self._request.unit is Unit.UNION else build()

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Text as it becomes complete. Raises ExpertUnavailable, and ExpertFault for an expert that keeps refusing."""
        decoder = self._opened
        self._ask()
        while self._round is not None:
            await self._resume(self._round)
            started = time.perf_counter()
            text = decoder.take_text()
            self._watch.mixed(time.perf_counter() - started)
            self._ask()
            if text:
                if self._round is not None:
                    # Sending keeps the event loop busy for as long as a text's mixing does: first the experts get their
                    # step, of all texts that were answered together.
                    await self._pool.settle()
                    for _ in range(_TURNS):
                        await asyncio.sleep(0)
                self._watch.text(len(text.encode()))
                started = time.perf_counter()
                yield text
                if self._round is None:
                    self._watch.parts.send += time.perf_counter() - started
                else:
                    self._round.sent_at = time.perf_counter()
        self._tell_parts(decoder.stopwatch)

    def _ask(self) -> None:
        """Submit what the decoder needs next, if it needs anything."""
        started = time.perf_counter()
        calls = self._opened.calls(self._drafts())
        self._watch.mixed(time.perf_counter() - started)
        self._round = self.members.ask(calls) if calls else None
        self._end_pause()

    def _answered(self, round_: Round, name: str, answer: asyncio.Future[list[Outcome]]) -> None:
        """One expert has answered, or was lost."""
        if round_ is not self._round:
            return
        if round_.answered:
            self._pause = self._pause or self._pool.pause()
        elif not answer.cancelled() and answer.exception() is None:
            # What is made of it while the others compute is ready when they have answered.
            work = self._opened.ahead(name, answer.result())
            if work is not None:
                self._ahead.append(self._pool.begin(work))

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.end()
            self._pause = None

    async def _resume(self, round_: Round) -> None:
        """Give the decoder what came back, and see to the experts that were lost."""
        for name, future in round_.futures.items():
            # Not before: a text whose reader is slow holds up nobody.
            future.add_done_callback(partial(self._answered, round_, name))
        outcomes = await self.members.answers(round_)
        answered, self._took = time.perf_counter(), 0.0
        lost = [name for name in round_.futures if name not in outcomes]
        try:
            if begun := [work for work in self._ahead if not work.done()]:
                await asyncio.wait(begun)
            self._ahead.clear()
            await self._pool.mix(partial(self._mix, outcomes))
        except BadLogits as fault:
            self._faults += 1
            if self._faults > _MAX_FAULTS:
                raise
            self.members.blame(fault)
            lost += fault.experts
        finally:
            self._watch.mixed(self._took)
            self._watch.parts.scheduling += time.perf_counter() - answered - self._took
        self.being_written = not lost
        if lost and not self._opened.finished:
            self._end_pause()
            await self._without_or_again(lost)

    def _mix(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """What may run in a thread: nothing but the decoder is touched."""
        started = time.perf_counter()
        try:
            self._opened.resume(outcomes)
        finally:
            self._took = time.perf_counter() - started

    def _tell_parts(self, stopwatch: Stopwatch) -> None:
        """Share out the coordinator's own time."""
        parts, seconds = self._watch.parts, stopwatch.seconds
        parts.mix, parts.prefix_mass, parts.walk = (seconds[part] for part in (Part.MIX, Part.PREFIX_MASS, Part.WALK))
        parts.scheduling += self._watch.mixing - stopwatch.total

    async def _without_or_again(self, lost: Collection[str]) -> None:
        """The text goes on without experts that were lost, or with their successors."""
        decoder, members = self._opened, self.members
        logger.warning("request %s: lost %s", self._watch.id, ", ".join(lost))
        before = set(members.names)
        await members.settle(sorted(set(lost)))
        if set(members.names) == before:
            members.reopened += len(set(lost))
            for name in set(lost):
                decoder.lost(name)
            return
        text, kind = decoder.take_back(), decoder.unit.kind
        encoded = await members.each(lambda link: self._continued(link, decoder, text))
        build = partial(self._ensemble.continued, kind, members.mixture, self._request, encoded)
        members.release(decoder.carry_on(await self._build(build)))

    async def _continued(self, link: ExpertLink, decoder: Decoder, text: str) -> EncodedPrompt:
        """Prompt and text so far, as an expert reads them."""
        prompt = self._prompts[link.name]
        if not text:
            return prompt
        if decoder.unit.kind is Unit.TOKEN:
            return EncodedPrompt(decoder.unit.history(0), 0)
        context, whole = scored_text(link.spec, prompt, text)
        tokens = context + await link.tokenize(whole)
        return EncodedPrompt(tokens, len(link.spec.vocabulary.token_bytes[tokens[-1]] or b""))

    def close(self) -> None:
        """Free what the text holds at its experts, however it ended."""
        if self._round is not None:
            self._round.cancel()
            self._round = None
        self._end_pause()
        if self._decoder is not None:
            self.members.release(self._decoder.close())


async def score_text(
    ensemble: Ensemble, members: Members, text: str, allocate: Callable[[str], int], pool: MixingPool
) -> Score:
    """Log-probability of `text` under the experts of `members`. An expert that comes back goes on where it was lost.

    Raises ExpertUnavailable, and what `Scorer` does.
    """
    prompts = await members.encode()
    pieces = await members.each(
        lambda link: link.tokenize(scored_text(link.spec, prompts[link.name], text)[1])
    )
    faults = 0
    while True:
        scorer = Scorer(ensemble, members.mixture, prompts, text, pieces, allocate)
        try:
            while calls := scorer.calls():
                outcomes = await members.answers(members.ask(calls))
                await pool.aside(partial(scorer.resume, outcomes))
                await members.settle([name for name in calls if name not in outcomes])
            return scorer.score
        except BadLogits as fault:
            faults += 1
            if faults > _MAX_FAULTS:
                raise
            members.blame(fault)
            at_fault = fault.experts
        finally:
            members.release(scorer.close())
        await members.settle(at_fault)
