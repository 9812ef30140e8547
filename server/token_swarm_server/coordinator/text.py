"""One text from its prompt to its end, through the death of any of its experts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from functools import partial

from token_swarm.decoding.decoder import Decoder, ExpertUse, Finish
from token_swarm.decoding.ensemble import Ensemble
from token_swarm.decoding.forwards import Outcome
from token_swarm.decoding.request import DecodeRequest
from token_swarm.decoding.score import scored_text
from token_swarm.errors import BadLogits
from token_swarm.experts.contract import EncodedPrompt
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.stopwatch import Part, Stopwatch
from token_swarm.mixing.unit import MixingUnit
from token_swarm_server.coordinator.expert.link import ExpertLink
from token_swarm_server.coordinator.mixing_pool import MixingPool, Pause
from token_swarm_server.coordinator.recovery import Members, Round
from token_swarm_server.telemetry.observer import Watch

logger = logging.getLogger(__name__)

_TURNS = 4
"""Of the event loop: in which a scheduler gets its step on the way."""


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
        self._ready: asyncio.Future[None] | None = None
        self._awaited = 0  # answers of the round that have not come, and works on answers that have not ended
        self._late: list[Stopwatch] = []  # of those that began when all had answered
        self._took = 0.0
        self._pause: Pause | None = None

    @property
    def finish(self) -> Finish:
        """How the text ended."""
        return self._opened.finish

    @property
    def use(self) -> Mapping[str, ExpertUse]:
        """What each expert contributed so far, by name; empty before the text was opened."""
        return {} if self._decoder is None else self._decoder.use

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
                # Not the length of `text`: bytes that are no UTF-8 are shown as a character of three.
                self._watch.text(decoder.shown - self._watch.length)
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
        if round_.answered and not round_.answered_at:
            self._pause = self._pause or self._pool.pause()
            self.members.round_ended(round_)
        if not answer.cancelled() and answer.exception() is None:
            # Of the faster experts' answers it is made while the others compute.
            stopwatch = Stopwatch()
            work = self._opened.ahead(name, answer.result(), stopwatch)
            if work is not None:
                self._awaited += 1
                self._pool.begin(work).add_done_callback(partial(self._made, round_))
                if round_.answered:
                    self._late.append(stopwatch)
        self._came()

    def _made(self, round_: Round, work: asyncio.Future[None]) -> None:
        """What was begun on one answer has ended; if it failed, `resume` fails as well."""
        work.exception()
        if round_ is self._round:
            self._came()

    def _came(self) -> None:
        """One of the things has come that the text waits for."""
        self._awaited -= 1
        if not self._awaited and self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.end()
            self._pause = None

    async def _resume(self, round_: Round) -> None:
        """Give the decoder what came back, and see to the experts that were lost."""
        # One future for all that a text waits for: it is woken once.
        self._ready = asyncio.get_running_loop().create_future()
        self._awaited, self._late = len(round_.futures), []
        for name, future in round_.futures.items():
            # Not before: a text whose reader is slow holds up nobody.
            future.add_done_callback(partial(self._answered, round_, name))
        await self._ready
        outcomes = self.members.outcomes(round_)
        lost = [name for name in round_.futures if name not in outcomes]
        made = sum(stopwatch.total for stopwatch in self._late)
        self._took = 0.0
        for stopwatch in self._late:
            self._opened.stopwatch.add(stopwatch)
        fault: BadLogits | None = None
        try:
            if self._late:
                # What is left is short, and holds the interpreter: threads would only get into each other's way.
                self._mix(outcomes)
            else:
                await self._pool.mix(partial(self._mix, outcomes))
        except BadLogits as error:
            fault = error
        finally:
            self._watch.mixed(made + self._took)
            self._watch.parts.scheduling += time.perf_counter() - round_.answered_at - made - self._took
        if fault is not None:
            self._end_pause()
            lost += await self._reread(fault)
        self.being_written = not lost
        if lost and not self._opened.finished:
            self._end_pause()
            await self._without_or_again(lost)

    async def _reread(self, fault: BadLogits) -> list[str]:
        """See to experts with invalid logits: returns those that are lost; others read the text anew."""
        decoder = self._opened
        for name in fault.experts:
            # The sequence may hold what made the logits so, and takes the place of the one for the probe.
            self.members.release(decoder.close_expert(name))
        lost, anew = await self.members.examine(fault, len(decoder.text))
        for name in anew:
            logger.warning("request %s: expert %s reads the text anew: %s", self._watch.id, name, fault.reason)
        return lost

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
