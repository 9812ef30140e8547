"""The sans-I/O decoder: asks for forwards, consumes logits, and gives out text.

decoder = Decoder(...)
while calls := decoder.calls():
    decoder.resume(<run every expert's operations>)
    show(decoder.take_text())
run(decoder.close())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from token_swarm.decoding.forwards import Calls, ContextFull, Forwards, Outcome
from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.decoding.text import StopMatcher, Utf8Stream
from token_swarm.mixing.sampling import Sampler
from token_swarm.mixing.stopwatch import Part, Stopwatch
from token_swarm.mixing.unit import MixingUnit, Need

_STRETCH = 64
"""Bytes that are chosen at most before stop strings are looked for again."""


@dataclass(frozen=True)
class ExpertUse:
    """What one expert contributed to a text.

    tokens: of its own tokenizer in the text. forwards: logit rows asked of it. wasted: of those, rows for
    histories the text did not take. drafted: of those asked, rows of drafts; accepted: of these, the ones that the
    text needed. share: mean posterior share of the chosen symbols.
    """

    tokens: int
    forwards: int
    wasted: int
    drafted: int
    accepted: int
    share: float


_UNUSED = ExpertUse(0, 0, 0, 0, 0, 0.0)


@dataclass(frozen=True)
class Finish:
    """How a text ended.

    length: bytes of the text that was shown. certificate: largest total-variation bound of a group's law over
    the text; retired: see `ByteGroup`.
    """

    reason: FinishReason
    length: int
    stop: bytes | None
    experts: Mapping[str, ExpertUse]
    certificate: float
    retired: float


class Decoder:
    """One text under one mixing unit."""

    def __init__(
        self,
        unit: MixingUnit,
        request: DecodeRequest,
        *,
        allocate: Callable[[str], int],
        lanes_per_expert: int = 2,
        forced: bytes | None = None,
    ) -> None:
        """allocate(expert) gives an unused sequence id. `forced` makes the decoder follow a text (byte unit
        only) and record `log_probs`, as scoring with the certificate does."""
        self.stopwatch = Stopwatch()
        """Where the time of `resume` goes."""
        self._unit = unit
        self._unit.stopwatch = self.stopwatch
        self._request = request
        self._allocate = allocate
        self._lanes_per_expert = lanes_per_expert
        self._forwards = Forwards(unit, allocate, lanes_per_expert)
        # What earlier units did, of a text that went on without one of its experts.
        self._earlier: dict[str, ExpertUse] = {}
        self._earlier_tokens = 0
        self._earlier_retired = 0.0
        self._sampler = Sampler(greedy=request.sampling.greedy, seed=request.seed, script=forced)
        self._stops = StopMatcher(request.stop)
        self._utf8 = Utf8Stream()
        self._needs: Sequence[Need] | None = None  # what the unit is known to need now
        self._forced = forced
        self._text = bytearray()
        self._shown = 0
        self._ready = ""
        self._shares: dict[str, float] = {}
        self._symbols = 0
        self._certificate = 0.0
        self._reason: FinishReason | None = None
        self.log_probs: list[float] = []
        """Log-probability (nats) of every chosen symbol under the mixed law."""

    @property
    def finished(self) -> bool:
        """Whether the text has ended."""
        return self._reason is not None

    @property
    def text(self) -> bytes:
        """The text so far, up to the stop string."""
        return bytes(self._text)

    @property
    def shown(self) -> int:
        """Bytes of the text that `take_text` has given out, or will next: those of complete code points."""
        return self._shown - self._utf8.incomplete

    @property
    def unit(self) -> MixingUnit:
        """What mixes the text now."""
        return self._unit

    def lost(self, expert: str) -> None:
        """The expert's sequences are gone: what is needed of them is opened again."""
        self._forwards.lost(expert)

    def close_expert(self, expert: str) -> Calls:
        """Operations that free what the text holds at one expert; the next `calls` let it read the text anew."""
        ops = self._forwards.close_expert(expert)
        return {expert: ops} if ops else {}

    def take_back(self) -> str:
        """Cut the text back to whole characters, none of which was shown, and return it: what another unit reads."""
        begun = Utf8Stream(bytes(self._text)).incomplete
        if begun:
            del self._text[len(self._text) - begun :]
            self._utf8.forget()
            self._shown = min(self._shown, len(self._text))
        return self._text.decode("utf-8", "replace")

    def carry_on(self, unit: MixingUnit) -> Calls:
        """Go on with a unit that has read `take_back()`; returns the operations that free what the old one held."""
        self._earlier = self.use
        self._earlier_tokens += self._unit.fewest_tokens()
        self._earlier_retired = max(self._earlier_retired, self._unit.retired)
        closing = self._forwards.close()
        self._unit, self._needs = unit, None
        self._unit.stopwatch = self.stopwatch
        self._forwards = Forwards(unit, self._allocate, self._lanes_per_expert)
        return closing

    def calls(self, drafts: int | None = None) -> Calls:
        """Operations to run next, by expert; empty when the text has ended. `drafts`: fewer tokens of a draft than the
        request allows, where there is no room for them."""
        if self.finished:
            return {}
        most = self._request.draft_tokens if drafts is None else min(drafts, self._request.draft_tokens)
        try:
            return self._forwards.calls(self._unit.due() if self._needs is None else self._needs, most)
        except ContextFull:
            self._finish(FinishReason.CONTEXT_FULL, len(self._text))
            return {}

    def ahead(self, expert: str, outcomes: Sequence[Outcome], stopwatch: Stopwatch) -> Callable[[], None] | None:
        """Work on what one expert returned, ahead of `resume`; see `Forwards.ahead`."""
        return self._forwards.ahead(expert, outcomes, stopwatch)

    def resume(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Take what the last `calls` returned, and go on until the next forward is needed. Raises as
        `Forwards.resume` does."""
        self._needs = None
        try:
            self._forwards.resume(outcomes)
        except ContextFull:
            self._finish(FinishReason.CONTEXT_FULL, len(self._text))
        while not self.finished:
            needs = self._unit.due()
            if not needs:
                self._walk()
            elif not self._forwards.serve(needs):
                self._needs = needs
                break

    def take_text(self) -> str:
        """Text that became showable since the last call: complete code points only."""
        ready, self._ready = self._ready, ""
        return ready

    def close(self) -> Calls:
        """Operations that free the text's KV; to be run however the text ended."""
        return self._forwards.close()

    def _walk(self) -> None:
        limits = [self._request.max_bytes, None if self._forced is None else len(self._forced)]
        room = min([_STRETCH, *(limit - len(self._text) for limit in limits if limit is not None)])
        limit = self._request.max_tokens
        left = None if limit is None else limit - self._earlier_tokens
        with self.stopwatch.measure(Part.WALK):
            walk = self._unit.walk(self._sampler, max_bytes=room, max_tokens=left)
        if not (walk.log_probs or walk.ended or self._unit.due()):
            # Whatever the reason: to try again would be a loop without an end, in which nobody else is served.
            raise RuntimeError(f"the text does not go on: room {room}, tokens left {left}, {self._request}")
        self.log_probs += walk.log_probs
        self._symbols += len(walk.log_probs)
        self._certificate = max(self._certificate, walk.certificate)
        for name, share in walk.shares.items():
            self._shares[name] = self._shares.get(name, 0.0) + share
        if walk.data:
            self._append(walk.data)
        if walk.ended and not self.finished:
            self._finish(FinishReason.END_OF_TEXT, len(self._text))

    def _append(self, data: bytes) -> None:
        self._text += data
        limit = self._request.max_bytes
        if limit is not None and len(self._text) > limit:
            data = data[: limit - len(self._text)]
            del self._text[limit:]
        showable = self._stops.push(self._text, len(data))
        if self._stops.matched is not None:
            self._finish(FinishReason.STOP_STRING, showable)
        elif limit is not None and len(self._text) >= limit:
            self._finish(FinishReason.MAX_BYTES, limit)
        elif self._tokens_reached():
            self._finish(FinishReason.MAX_TOKENS, len(self._text))
        elif self._forced is not None and len(self._text) == len(self._forced):
            self._finish(FinishReason.MAX_BYTES, len(self._text))
        else:
            self._show(showable)

    def _finish(self, reason: FinishReason, length: int) -> None:
        self._reason = reason
        del self._text[length:]
        self._show(length)
        # A code point that the limit cut is not shown: half of it would be a character nobody meant.
        del self._text[len(self._text) - self._utf8.incomplete :]

    @property
    def finish(self) -> Finish:
        """How the text ended. Raises RuntimeError while it has not."""
        if self._reason is None:
            raise RuntimeError("the text has not ended: run `calls` and `resume` until `finished`")
        return Finish(
            reason=self._reason,
            length=len(self._text),
            stop=self._stops.matched,
            experts=self.use,
            certificate=self._certificate,
            retired=max(self._earlier_retired, self._unit.retired),
        )

    @property
    def use(self) -> dict[str, ExpertUse]:
        """What each expert contributed so far; of a text that has not ended as well."""
        use = dict(self._earlier)
        for index, group in enumerate(self._unit.groups):
            history = self._unit.history(index)
            forwarded = self._forwards.histories[index]
            on_path = sum(history[: len(other)] == other for other in forwarded)
            for name in group.names:
                before = self._earlier.get(name, _UNUSED)
                use[name] = ExpertUse(
                    tokens=before.tokens + self._unit.own_tokens(index),
                    forwards=before.forwards + len(forwarded),
                    wasted=before.wasted + len(forwarded) - on_path,
                    drafted=before.drafted + self._forwards.drafted[index],
                    accepted=before.accepted + self._forwards.accepted[index],
                    share=0.0,
                )
        return {
            name: replace(own, share=self._shares.get(name, 0.0) / max(1, self._symbols)) for name, own in use.items()
        }

    def _tokens_reached(self) -> bool:
        limit = self._request.max_tokens
        return limit is not None and self._earlier_tokens + self._unit.fewest_tokens() >= limit

    def _show(self, showable: int) -> None:
        if showable > self._shown:
            self._ready += self._utf8.push(bytes(self._text[self._shown : showable]))
            self._shown = showable
