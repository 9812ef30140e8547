"""The coordinator's end of the connection to one expert's process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc

from token_swarm.errors import BadParameter, ExpertFault
from token_swarm.experts.contract import EncodedPrompt, ExpertSpec, ExpertStats, Op
from token_swarm.files import replacing
from token_swarm.v1 import expert_pb2, expert_pb2_grpc
from token_swarm.vocabulary import Vocabulary
from token_swarm_server.config.settings import ClientTls
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.expert_protocol import shared_memory as transport
from token_swarm_server.expert_protocol.messages import TimedStepResult
from token_swarm_server.rpc.channels import open_channel
from token_swarm_server.rpc.errors import ExpertUnavailable, TransportError

_STATS_SECONDS = 5.0
_OPTIONS = (
    ("grpc.max_send_message_length", transport.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", transport.MAX_MESSAGE_BYTES),
    # Otherwise the connection to a restarted expert inherits the back-off of its dead predecessor ...
    ("grpc.use_local_subchannel_pool", 1),
    # ... and an expert that is still loading would be found up to two minutes late.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def _raise(name: str, error: grpc.aio.AioRpcError) -> NoReturn:
    """Raise what a failed call to expert `name` means."""
    details = error.details() or error.code().name
    if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL):
        raise TransportError(f"expert {name!r} answered: {details}") from error
    raise ExpertUnavailable(name, details) from error


async def _get_vocabulary(stub: expert_pb2_grpc.ExpertServiceAsyncStub, fingerprint: str) -> bytes:
    """Download a vocabulary. Raises TransportError when it is endless."""
    pieces = bytearray()
    async for piece in stub.GetVocabulary(expert_pb2.GetVocabularyRequest()):
        pieces += piece.data
        if len(pieces) > transport.MAX_MESSAGE_BYTES:
            raise TransportError(f"vocabulary {fingerprint}: more than {transport.MAX_MESSAGE_BYTES} bytes")
    return bytes(pieces)


def _load(path: Path, fingerprint: str) -> Vocabulary | None:
    """The cached vocabulary, or None if there is none or it is not what its name says."""
    try:
        vocabulary = Vocabulary.from_bytes(path.read_bytes())
    except (OSError, ValueError):
        return None
    return vocabulary if vocabulary.fingerprint == fingerprint else None


def _store(path: Path, data: bytes) -> Vocabulary:
    """Parse a downloaded vocabulary and cache it. Raises TransportError if it is none."""
    try:
        vocabulary = Vocabulary.from_bytes(data)
    except ValueError as error:
        raise TransportError(f"vocabulary: {error}") from error
    with replacing(path) as file:
        file.write(data)
    return vocabulary


async def _fetch(stub: expert_pb2_grpc.ExpertServiceAsyncStub, fingerprint: str, cache: Path) -> Vocabulary:
    """The vocabulary from the cache, or from the expert. Raises as `_store` does."""
    path = cache / f"{fingerprint}.vocabulary"
    vocabulary = await asyncio.to_thread(_load, path, fingerprint)
    if vocabulary is None:
        data = await _get_vocabulary(stub, fingerprint)
        vocabulary = await asyncio.to_thread(_store, path, data)
    return vocabulary


class ExpertConnection:
    """An attached connection; made by `connect`. Not for use from several threads."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        stub: expert_pb2_grpc.ExpertServiceAsyncStub,
        spec: ExpertSpec,
        max_rows: int,
    ) -> None:
        self.spec = spec
        self.max_rows = max_rows
        self.transport = expert_pb2.TRANSPORT_INLINE
        self._channel = channel
        self._stub = stub
        self._segment: transport.SegmentReader | None = None
        self._number = 0
        self._one_at_a_time = asyncio.Lock()
        self._lost = asyncio.Event()
        self._call: grpc.aio.StreamStreamCall[Any, Any] = stub.Decode(None)
        self._call.add_done_callback(lambda _: self._lost.set())

    @classmethod
    async def connect(
        cls,
        address: str,
        name: str,
        *,
        cache: Path,
        prefer: expert_pb2.Transport.ValueType = expert_pb2.TRANSPORT_UNSPECIFIED,
        wait_seconds: float = 30.0,
        tls: ClientTls | None = None,
        known: Vocabulary | None = None,
    ) -> ExpertConnection:
        """Connect to the expert called `name` and attach.

        `cache`: directory for vocabularies. `prefer`: how logits travel. `wait_seconds`: for the
        expert to answer at all. `known`: a vocabulary that it probably has: it is then neither read nor held twice.
        Raises ExpertUnavailable if it does not, TransportError if it is another expert or breaks the
        protocol, and BadParameter for TLS files that cannot be used.
        """
        channel = open_channel(address, tls, options=_OPTIONS, tls_prefix=f"experts.{name}.tls.")
        try:
            stub: expert_pb2_grpc.ExpertServiceAsyncStub = expert_pb2_grpc.ExpertServiceStub(channel)
            description = await stub.Describe(
                expert_pb2.DescribeRequest(), timeout=wait_seconds, wait_for_ready=True
            )
            if description.name != name:
                raise TransportError(
                    f"experts.{name}.address: {address} is expert {description.name[:80]!r}, expected {name!r}"
                )
            wire.check_description(description)
            if known is not None and known.fingerprint == description.fingerprint:
                vocabulary = known
            else:
                vocabulary = await _fetch(stub, description.fingerprint, cache)
            spec = wire.spec_from_proto(description, vocabulary)
            connection = cls(channel, stub, spec, description.max_rows_per_step)
            await connection._attach(description, prefer)
        except grpc.aio.AioRpcError as error:
            await channel.close(None)
            _raise(name, error)
        except BaseException:
            await channel.close(None)
            raise
        return connection

    async def _attach(
        self, description: expert_pb2.DescribeResponse, wanted: expert_pb2.Transport.ValueType
    ) -> None:
        possible = description.HasField("shared_memory") and transport.is_shared(description.shared_memory)
        if wanted == expert_pb2.TRANSPORT_UNSPECIFIED and not possible:
            wanted = expert_pb2.TRANSPORT_INLINE
        answer = await self._exchange(expert_pb2.DecodeRequest(attach=expert_pb2.Attach(transport=wanted)))
        if answer.WhichOneof("message") == "offer":
            try:
                directory = Path(description.shared_memory.directory)
                self._segment = transport.SegmentReader(directory, answer.offer)
            except OSError:
                # Not shared after all; the expert then sends logits inline.
                self._segment = None
            mapped = expert_pb2.Mapped(success=self._segment is not None)
            answer = await self._exchange(expert_pb2.DecodeRequest(mapped=mapped))
        expected = expert_pb2.TRANSPORT_SHARED_MEMORY if self._segment else expert_pb2.TRANSPORT_INLINE
        if answer.WhichOneof("message") != "attached" or answer.attached.transport != expected:
            raise TransportError(f"expert {self.spec.name!r} did not attach as agreed")
        self.transport = expected

    async def _exchange(self, request: expert_pb2.DecodeRequest) -> expert_pb2.DecodeResponse:
        await self._call.write(request)
        answer = await self._call.read()
        if not isinstance(answer, expert_pb2.DecodeResponse):
            raise ExpertUnavailable(self.spec.name, "it ended the stream")
        return answer

    async def step(self, ops: Sequence[Op]) -> TimedStepResult:
        """Apply `ops`; the expert's answer, with logits [rows, width].

        Logits in shared memory stay where they are for as long as anything refers to them; while that is so of every
        slot, they travel inside the message, which takes longer.

        One step is under way at a time. Cancelling this ends the connection: the expert's state would not be
        known. Raises BadParameter as `wire.check_ops` does, and ExpertUnavailable or TransportError: after these
        two the connection is of no more use.
        """
        wire.check_ops(ops, self.max_rows)
        async with self._one_at_a_time:
            self._number += 1
            slot = None if self._segment is None else self._segment.vacant()
            step = expert_pb2.Step(number=self._number, ops=wire.ops_to_proto(ops), slot=slot)
            try:
                answer = await self._exchange(expert_pb2.DecodeRequest(step=step))
            except grpc.aio.AioRpcError as error:
                _raise(self.spec.name, error)
            except asyncio.InvalidStateError as error:
                raise ExpertUnavailable(self.spec.name, "the connection is closed") from error
            return self._result(answer.step, ops, slot)

    def _result(self, reply: expert_pb2.StepReply, ops: Sequence[Op], slot: int | None) -> TimedStepResult:
        width, dtype = self.spec.vocabulary.width, self.spec.dtype
        spans, errors = wire.layout_from_proto(reply, number=self._number, ops=ops, width=width, dtype=dtype)
        rows = spans[-1][1] if spans else 0
        logits = transport.take_logits(reply, rows, dtype, self._segment, slot)
        inline = reply.WhichOneof("logits") == "inline"
        return TimedStepResult(logits, spans, errors, reply.seconds, reply.batch_size, inline)

    async def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """`Expert.encode` there. Raises BadParameter for a prompt that the expert refuses, ExpertFault if it fails."""
        try:
            request = expert_pb2.EncodeRequest(prompt=prompt, chat=chat)
            encoded = await self._answer(self._stub.Encode(request))
        except (grpc.aio.AioRpcError, ValueError) as error:
            self._refuse_text("prompt", prompt, error)
        if not encoded.tokens:
            raise TransportError(f"expert {self.spec.name!r} encoded a prompt as no tokens")
        self._check_tokens(encoded.tokens)
        return EncodedPrompt(tuple(encoded.tokens), encoded.tail)

    async def tokenize(self, text: str) -> tuple[int, ...]:
        """`Expert.tokenize` there. Raises BadParameter for a text that the expert refuses, ExpertFault if it fails."""
        try:
            tokens = (await self._answer(self._stub.Tokenize(expert_pb2.TokenizeRequest(text=text)))).tokens
        except (grpc.aio.AioRpcError, ValueError) as error:
            self._refuse_text("text", text, error)
        self._check_tokens(tokens)
        return tuple(tokens)

    async def _answer(self, call: Any) -> Any:
        """What a call with one answer gives. Raises ExpertUnavailable when the connection is closed meanwhile.

        grpc cancels the call then; passed on, that would end the request of a client without any status.
        """
        try:
            return await call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ExpertUnavailable(self.spec.name, "the connection is closed") from None

    async def stats(self) -> ExpertStats:
        """What the expert holds, over all of its callers. Raises ExpertUnavailable or TransportError."""
        try:
            stats = await self._answer(self._stub.GetStats(expert_pb2.GetStatsRequest(), timeout=_STATS_SECONDS))
        except grpc.aio.AioRpcError as error:
            _raise(self.spec.name, error)
        return ExpertStats(stats.sequences, stats.tokens, stats.capacity, dict(stats.engine))

    def _refuse_text(self, field: str, text: str, error: grpc.aio.AioRpcError | ValueError) -> NoReturn:
        """Raise what a failed `encode` or `tokenize` means."""
        if isinstance(error, ValueError):
            raise BadParameter(field, text, "valid Unicode without lone surrogates") from error
        if error.code() is grpc.StatusCode.INTERNAL:
            # The caller is not to blame, as TransportError would say.
            raise ExpertFault(self.spec.name, f"it could not read the {field}; the expert's log has more") from error
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            _raise(self.spec.name, error)
        allowed = f"text that expert {self.spec.name!r} can encode ({error.details()})"
        raise BadParameter(field, text, allowed) from error

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if tokens and max(tokens) >= self.spec.vocabulary.width:
            raise TransportError(
                f"expert {self.spec.name!r} sent token {max(tokens)} of {self.spec.vocabulary.width}"
            )

    async def wait_lost(self) -> None:
        """Return once the expert is gone or the connection closed."""
        await self._lost.wait()

    async def close(self) -> None:
        """End the stream, whereupon the expert frees its sequences, and disconnect."""
        self._call.cancel()
        await self._channel.close(None)
        if self._segment is not None:
            self._segment.close()
