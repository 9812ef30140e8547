"""What the engine tells of its work: one call per event, and sinks (metrics, traces, logs) that listen.

The engine, the schedulers and the service know only `Observer` and `Watch`. Without sinks both only keep a few numbers.
All of it runs in the event loop's thread.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple

from google.rpc import code_pb2

from token_swarm_server.rpc.errors import to_status
from token_swarm_server.telemetry.breakdown import ExpertTime, Parts

logger = logging.getLogger(__name__)

MAX_REQUEST_ID = 64
"""Characters of a client's request id that are kept."""

_TRACE_KEYS = ("traceparent", "tracestate")


def request_id(given: str) -> str:
    """The id of a request in logs and traces: what the client gave without unprintable characters, or a new one.

    It goes into log lines and HTTP/2 metadata, so only printable ASCII without spaces stays.
    """
    kept = "".join(c for c in given[: 4 * MAX_REQUEST_ID] if "!" <= c <= "~")[:MAX_REQUEST_ID]
    return kept or secrets.token_hex(8)


class Step(NamedTuple):
    """One answered step of an expert.

    `seconds`: from sending it to its answer; `compute`: of that, in the expert. `submissions`: of how many requests'
    calls it was made. `batch`: sequences that were given tokens in the same forward. `rows`: logit rows, `logits_bytes`
    their size, `inline` whether they travelled inside the message.
    """

    expert: str
    seconds: float
    compute: float
    submissions: int
    batch: int
    tokens: int
    rows: int
    logits_bytes: int
    inline: bool = False


@dataclass(frozen=True)
class Work:
    """What was done for a text until it ended, however it did. By expert: `tokens` of the text, `shares`, and tokens
    that were `drafted` and of these `accepted`. `dropped`: experts that it went on without; `reopened`: how often one
    was lost and read the text again."""

    tokens: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    reopened: int = 0
    drafted: Mapping[str, int] = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)


class Sink:
    """Listens to an Observer. Every method may be left out; none may raise or wait."""

    def request_started(self, watch: Watch) -> None:
        """A request has arrived; its mixture is not known yet."""

    def request_admitted(self, watch: Watch) -> None:
        """It holds KV on all its experts."""

    def text(self, watch: Watch, n_bytes: int, gap: float | None) -> None:
        """It wrote `n_bytes`, `gap` seconds after the chunk before; None for the first chunk."""

    def mixed(self, seconds: float) -> None:
        """The coordinator worked so long on a text between two forwards."""

    def request_finished(self, watch: Watch) -> None:
        """It is over, whatever its status."""

    def step(self, step: Step) -> None:
        """An expert has answered a step."""

    def expert_changed(self, expert: str, state: str, reason: str) -> None:
        """An expert is `state` now: ready, starting or down; `reason` says why it is not ready."""

    def close(self) -> None:
        """The server ends: flush, and free ports and threads."""


def _overridden(sinks: Sequence[Sink], method: str) -> tuple[Callable[..., None], ...]:
    """The methods of this name that do something: what is called for every byte is not called for nothing."""
    return tuple(getattr(sink, method) for sink in sinks if getattr(type(sink), method) is not getattr(Sink, method))


class Watch:
    """One request as it is seen from outside; a context manager around all of its work.

    Times are `time.perf_counter()` seconds. Leaving the context ends the request with the status of the exception
    that leaves with it.
    """

    __slots__ = (
        "_first_length", "_observer", "admitted_at", "chunks", "deadline", "ended_at", "error", "experts",
        "first_text_at", "id", "kind", "last_text_at", "length", "mixing", "parts", "prompt_bytes",
        "prompt_tokens", "reason", "rule", "started_at", "status", "trace", "unit", "weights", "work",
    )  # fmt: skip

    def __init__(
        self,
        observer: Observer,
        kind: Literal["generate", "score"],
        given_id: str,
        prompt_bytes: int,
        trace: Mapping[str, str],
        deadline: float | None,
    ) -> None:
        self._observer = observer
        self._first_length = 0
        self.kind = kind
        self.id = request_id(given_id)
        self.prompt_bytes = prompt_bytes
        self.trace = trace
        """The metadata of the call that name the trace it belongs to."""
        self.deadline = deadline
        """When the client stops waiting. None: never."""
        self.rule = ""
        self.unit = ""
        self.weights: Mapping[str, float] = {}
        self.prompt_tokens: Mapping[str, int] = {}
        self.experts: dict[str, ExpertTime] = {}
        self.parts = Parts()
        self.mixing = 0.0
        """Seconds from an expert's logits to the next forwards or text."""
        self.length = 0
        """Bytes of text written."""
        self.chunks = 0
        self.started_at = time.perf_counter()
        self.admitted_at: float | None = None
        self.first_text_at: float | None = None
        self.last_text_at: float | None = None
        self.ended_at: float | None = None
        self.work = Work()
        self.reason: str | None = None
        """How it ended as it should: a FinishReason in lower case, such as max_bytes, or scored."""
        self.status = ""
        """Name of the gRPC status; empty while the request runs."""
        self.error = ""
        """Type of the exception that ended it. Its message is left out: it may quote the text."""

    def planned(self, rule: str, unit: str, weights: Mapping[str, float]) -> None:
        """The mixture is known: `linear` or `log-linear`; token, byte or union; weight by expert."""
        self.rule, self.unit, self.weights = rule, unit, weights

    def encoded(self, tokens: Mapping[str, int]) -> None:
        """The experts have encoded the prompt, to so many tokens each."""
        self.prompt_tokens = tokens

    def admitted(self) -> None:
        """The request holds KV on all its experts."""
        self.admitted_at = time.perf_counter()
        for sink in self._observer.sinks:
            sink.request_admitted(self)

    def forward(self, expert: str, queue: float, compute: float, transport: float, tokens: int) -> None:
        """One submission to `expert` was answered. Seconds: in its queue, in the model, travelling."""
        times = self.experts.setdefault(expert, ExpertTime())
        times.answered_at = time.perf_counter()
        times.queue += queue
        times.compute += compute
        times.transport += transport
        times.calls += 1
        times.tokens += tokens

    def round_ended(
        self, asked: Collection[str], experts: Collection[str], since: float, sent_at: float = 0.0
    ) -> None:
        """What was submitted to the experts `asked` at `since` has been answered by all; `experts`: all of the text.

        `sent_at`: when the reader had taken the text that was sent meanwhile.
        """
        now, answers = time.perf_counter(), {}
        for name in experts:
            own = self.experts.setdefault(name, ExpertTime())
            # One that was lost, or not asked, has been waiting all the time.
            answers[name] = max(since, own.answered_at) if name in asked else since
        last = max(answers.values(), default=now)
        for name, answered_at in answers.items():
            self.experts[name].wait += last - answered_at
        # Sending costs only what it takes longer than the experts.
        free = min(now, max(last, sent_at))
        self.parts.send += free - last
        # The event loop was busy with other texts.
        self.parts.scheduling += now - free

    def mixed(self, seconds: float) -> None:
        """The coordinator worked so long on the text between two forwards."""
        self.mixing += seconds
        for tell in self._observer.mixed:
            tell(seconds)

    def text(self, n_bytes: int) -> None:
        """A chunk of text is complete."""
        now = time.perf_counter()
        last = self.last_text_at
        self.last_text_at = now
        self.length += n_bytes
        self.chunks += 1
        if last is None:
            self.first_text_at = now
            self._first_length = n_bytes
        gap = None if last is None else now - last
        for tell in self._observer.text:
            tell(self, n_bytes, gap)

    def worked(self, work: Work) -> None:
        """So much was done for the text, which is over; also one that was cancelled or failed."""
        self.work = work

    def finished(self, reason: str) -> None:
        """The text ended as it should. The request ends when the context is left."""
        self.reason = reason

    @property
    def seconds_per_byte(self) -> float | None:
        """Mean over the bytes after the first chunk. None: there are none."""
        if self.last_text_at is None or self.first_text_at is None or self.length == self._first_length:
            return None
        return (self.last_text_at - self.first_text_at) / (self.length - self._first_length)

    def __enter__(self) -> Watch:
        for sink in self._observer.sinks:
            sink.request_started(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended_at = time.perf_counter()
        self.status = self._status(error)
        self.error = "" if kind is None or self.status == "OK" else kind.__name__
        for sink in self._observer.sinks:
            try:
                sink.request_finished(self)
            except Exception:
                # A text that is complete does not fail because nobody could be told of it.
                logger.exception("%s could not record request %s", type(sink).__name__, self.id)

    def _status(self, error: BaseException | None) -> str:
        if isinstance(error, Exception):
            name: str = code_pb2.Code.Name(to_status(error).code)
            return name
        # A client that has the last message may leave before the handler has ended: the text is complete.
        if error is None or self.reason is not None:
            return "OK"
        # grpc.aio cancels the handler for a client that left and for a deadline that passed alike.
        late = self.deadline is not None and time.perf_counter() >= self.deadline
        return "DEADLINE_EXCEEDED" if late else "CANCELLED"


class Observer:
    """Hands events to its sinks."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = tuple(sinks)
        self.text = _overridden(sinks, "text")
        """What a Watch calls for a chunk of text."""
        self.mixed = _overridden(sinks, "mixed")
        """What a Watch calls for a round of mixing."""
        self._step = _overridden(sinks, "step")

    def request(
        self,
        kind: Literal["generate", "score"],
        given_id: str = "",
        *,
        prompt_bytes: int = 0,
        metadata: Mapping[str, str] | None = None,
        time_remaining: float | None = None,
    ) -> Watch:
        """A request has arrived. To be entered inside of what turns exceptions into a gRPC status.

        `prompt_bytes`: to be read before text is written; for a score, the text as well. `metadata`: of the call.
        `time_remaining`: seconds that its client waits.
        """
        deadline = None if time_remaining is None else time.perf_counter() + time_remaining
        # Nothing else is kept: the metadata of a call may hold its credentials.
        trace = {key: value for key, value in (metadata or {}).items() if key in _TRACE_KEYS}
        return Watch(self, kind, given_id, prompt_bytes, trace, deadline)

    def step(self, step: Step) -> None:
        """An expert has answered a step."""
        for tell in self._step:
            tell(step)

    def expert_changed(self, expert: str, state: str, reason: str = "") -> None:
        """An expert is `state` now: ready, starting or down."""
        for sink in self.sinks:
            sink.expert_changed(expert, state, reason)

    def close(self) -> None:
        """End every sink."""
        for sink in self.sinks:
            sink.close()
