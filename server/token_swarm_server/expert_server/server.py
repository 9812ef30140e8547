"""The process of one expert: ExpertService over gRPC around any implementation of the expert contract."""

# ruff: noqa: N802, ARG002 - gRPC gives the handlers their names and arguments

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from token_swarm import memory
from token_swarm.errors import FailedPrecondition
from token_swarm.experts.contract import Expert
from token_swarm.experts.ops import row_count
from token_swarm.v1 import expert_pb2, expert_pb2_grpc
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.expert_protocol import shared_memory as transport
from token_swarm_server.expert_server.worker import ExpertWorker, Stream
from token_swarm_server.rpc import errors
from token_swarm_server.rpc.errors import TransportError
from token_swarm_server.rpc.host import LOCAL, Access, GrpcHost, stop_signal
from token_swarm_server.rpc.malformed import MalformedRequests, read_message

logger = logging.getLogger(__name__)

SERVICE = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name
# Rows that a slot holds: a decoding step of this many heads. Larger steps (scoring) travel inline.
SLOT_ROWS = 32
_VOCABULARY_CHUNK = 2**20
# Left in a message for everything but the logits.
_ENVELOPE_BYTES = 2**20
_Context = grpc.aio.ServicerContext[Any, Any]


class _Servicer(expert_pb2_grpc.ExpertServiceServicer):
    """Handlers. `directory`: where segments of shared memory are created."""

    def __init__(self, expert: Expert, worker: ExpertWorker, max_rows: int, directory: Path) -> None:
        self._expert = expert
        self._worker = worker
        self._directory = directory
        self._shared_memory = transport.shared_memory_identity(directory)
        self._description = wire.spec_to_proto(expert.spec, max_rows=max_rows, shared_memory=self._shared_memory)
        # Tokenizing does not wait for the model.
        self._tokenizer = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Wait for the tokenizer's thread."""
        self._tokenizer.shutdown()

    async def Describe(self, request: expert_pb2.DescribeRequest, context: _Context) -> expert_pb2.DescribeResponse:
        """Return the expert's spec."""
        return self._description

    async def GetVocabulary(
        self, request: expert_pb2.GetVocabularyRequest, context: _Context
    ) -> AsyncIterator[expert_pb2.GetVocabularyResponse]:
        """Stream the vocabulary."""
        data = self._expert.spec.vocabulary.to_bytes()
        for start in range(0, len(data), _VOCABULARY_CHUNK):
            yield expert_pb2.GetVocabularyResponse(data=data[start : start + _VOCABULARY_CHUNK])

    async def Encode(self, request: expert_pb2.EncodeRequest, context: _Context) -> expert_pb2.EncodeResponse:
        """Encode a prompt."""
        loop = asyncio.get_running_loop()
        try:
            encoded = await loop.run_in_executor(
                self._tokenizer, lambda: self._expert.encode(request.prompt, chat=request.chat)
            )
            return expert_pb2.EncodeResponse(tokens=encoded.tokens, tail=encoded.tail)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as exception:
            await errors.abort(context, exception)

    async def Tokenize(self, request: expert_pb2.TokenizeRequest, context: _Context) -> expert_pb2.TokenizeResponse:
        """Tokenize a text."""
        loop = asyncio.get_running_loop()
        try:
            tokens = await loop.run_in_executor(self._tokenizer, self._expert.tokenize, request.text)
            return expert_pb2.TokenizeResponse(tokens=tokens)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as exception:
            await errors.abort(context, exception)

    async def GetStats(self, request: expert_pb2.GetStatsRequest, context: _Context) -> expert_pb2.GetStatsResponse:
        """Say what the expert held after its latest step, and what its process holds now."""
        stats = self._worker.stats
        engine = {**stats.engine, "resident_bytes": memory.resident_bytes()}
        return expert_pb2.GetStatsResponse(
            sequences=stats.sequences, tokens=stats.tokens, capacity=stats.capacity, engine=engine
        )

    async def Decode(  # type: ignore[override]  # the stubs know only the generator style
        self, request_iterator: AsyncIterator[expert_pb2.DecodeRequest], context: _Context
    ) -> None:
        """Run one stream; whatever ends it, its sequences and its segment are freed."""
        stream = self._worker.open_stream()
        try:
            await self._attach(stream, context)
            number = 0
            while (request := await read_message(context)) is not transport.END_OF_STREAM:
                number += 1
                if request.WhichOneof("message") != "step" or request.step.number != number:
                    raise TransportError(f"expected step {number}")
                ops = wire.ops_from_proto(request.step.ops)
                if (rows := sum(map(row_count, ops))) > self._description.max_rows_per_step:
                    raise TransportError(
                        f"step {number} asks for {rows} logit rows; "
                        f"at most {self._description.max_rows_per_step} are allowed"
                    )
                slot = request.step.slot if request.step.HasField("slot") else None
                if slot is not None and slot >= (slots := 0 if stream.segment is None else stream.segment.slots):
                    raise TransportError(f"step {number} asks for slot {slot} of {slots}")
                reply = await self._worker.submit(stream, number, ops, slot)
                await context.write(expert_pb2.DecodeResponse(step=reply))
        except Exception as exception:
            await errors.abort(context, exception)
        finally:
            self._worker.close_stream(stream)

    async def _attach(self, stream: Stream, context: _Context) -> None:
        request = await read_message(context)
        if request is transport.END_OF_STREAM or request.WhichOneof("message") != "attach":
            raise TransportError("expected attach as the first message of the stream")
        chosen = expert_pb2.TRANSPORT_INLINE
        if request.attach.transport != expert_pb2.TRANSPORT_INLINE and await self._share(stream, context):
            chosen = expert_pb2.TRANSPORT_SHARED_MEMORY
        elif request.attach.transport == expert_pb2.TRANSPORT_SHARED_MEMORY:
            raise FailedPrecondition("transport: shared memory was asked for, but cannot be had")
        attached = expert_pb2.Attached(transport=chosen)
        await context.write(expert_pb2.DecodeResponse(attached=attached))

    async def _share(self, stream: Stream, context: _Context) -> bool:
        """Offer a segment; False if there is none, or the caller could not map it."""
        if self._shared_memory is None:
            return False
        spec = self._expert.spec
        row_bytes = spec.vocabulary.width * spec.dtype.itemsize
        slot_bytes = min(SLOT_ROWS * row_bytes, transport.MAX_MESSAGE_BYTES)
        try:
            segment = transport.SegmentWriter(self._directory, slot_bytes)
        except OSError as error:
            logger.warning("no shared memory for logits in %s: %s", self._directory, error)
            return False
        stream.segment = segment
        try:
            offer = expert_pb2.Offer(name=segment.name, slots=segment.slots, slot_bytes=slot_bytes)
            await context.write(expert_pb2.DecodeResponse(offer=offer))
            answer = await read_message(context)
        finally:
            segment.unlink()
        if answer is transport.END_OF_STREAM or answer.WhichOneof("message") != "mapped":
            raise TransportError("expected mapped as the answer to an offer")
        if not answer.mapped.success:
            stream.segment = None
            segment.close()
        return bool(answer.mapped.success)


class ExpertServer:
    """One expert behind one address, from `start` to `stop`."""

    def __init__(
        self, expert: Expert, address: str, *, directory: Path = Path("/dev/shm"), access: Access = LOCAL
    ) -> None:
        """`address`: unix:PATH, or host:port (0: any). `directory`: memory-backed.

        Raises BadParameter for an address that cannot be used, or not with this `access`.
        """
        spec = expert.spec
        row_bytes = spec.vocabulary.width * spec.dtype.itemsize
        max_rows = max(1, (transport.MAX_MESSAGE_BYTES - _ENVELOPE_BYTES) // row_bytes)
        self._expert = expert
        self._worker = ExpertWorker(expert, max_rows)
        self._servicer = _Servicer(expert, self._worker, max_rows, directory)
        self._host = GrpcHost(
            SERVICE,
            address,
            field="address",
            access=access,
            max_message_bytes=transport.MAX_MESSAGE_BYTES,
            interceptors=[MalformedRequests()],
        )
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self._servicer, self._host.server)

    @property
    def address(self) -> str:
        """Where it listens; with the port that was chosen once it has started."""
        return self._host.address

    async def start(self) -> None:
        """Listen. Raises BadParameter if the address is taken."""
        self._host.bind()
        self._worker.start()
        await self._host.start()

    async def stop(self) -> None:
        """Say so to health checks, end every stream, free its sequences, then free the expert."""
        await self._host.announce_stop()
        await self._host.server.stop(None)
        await self._worker.stop()
        self._servicer.close()
        self._expert.close()


async def serve(
    expert: Expert,
    address: str,
    *,
    directory: Path = Path("/dev/shm"),
    access: Access = LOCAL,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Host `expert` until SIGTERM or SIGINT; `on_ready` is called with the address once it answers.

    Raises BadParameter for an address that cannot be used or is taken.
    """
    stopping = stop_signal()
    server = ExpertServer(expert, address, directory=directory, access=access)
    await server.start()
    try:
        if on_ready is not None:
            on_ready(server.address)
        await stopping.wait()
    finally:
        await server.stop()
