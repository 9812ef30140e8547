"""Ten thousand messages that no client and no expert means: each gets a proper answer, and nothing is left behind.

FUZZ_SCALE=10 sends ten times as many, FUZZ_RANDOM=1 other ones every time, FUZZ_SHRINK=1 makes what fails smaller.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.expert_protocol import shared_memory as transport
from token_swarm_server.expert_protocol.shared_memory import END_OF_STREAM
from token_swarm_server.rpc.errors import ExpertUnavailable, TransportError

from tests.integration import fuzzing
from tests.integration.fuzzing import Swarm, sent
from tests.integration.lying_replies import lies, step_replies, taken
from token_swarm.experts.contract import Open
from token_swarm.v1 import expert_pb2, swarm_pb2, swarm_pb2_grpc

SCALE = float(os.environ.get("FUZZ_SCALE", "1"))
CALL_SECONDS = 30.0
Code = grpc.StatusCode
REFUSALS = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION}


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Profile of a test with so many examples."""
    return settings(
        max_examples=max(1, int(examples * SCALE)),
        derandomize="FUZZ_RANDOM" not in os.environ,
        phases=[Phase.generate, *([Phase.shrink] if "FUZZ_SHRINK" in os.environ else [])],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with fuzzing.running(tmp_path_factory.mktemp("fuzz")) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def undisturbed(swarm: Swarm) -> Iterator[None]:
    """After everything a good request gets the text that it got before."""
    before = swarm.run(good(swarm.public))
    yield
    assert swarm.run(good(swarm.public)) == before
    settle(swarm)


async def good(channel: grpc.aio.Channel) -> str:
    """The text of a request that nothing is wrong with."""
    request = swarm_pb2.GenerateRequest(prompt="ab", max_bytes=12, sampling=swarm_pb2.Sampling(temperature=0))
    code, details, answers = await outcome(swarm_pb2_grpc.SwarmServiceStub(channel).Generate(request))
    assert code is Code.OK, details
    return "".join(answer.chunk.text for answer in answers)


def settle(swarm: Swarm) -> None:
    """Wait until nothing is in use any more, and check that no request cost an expert its life."""
    end = time.monotonic() + 20
    while any(swarm.held().values()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(swarm.held().values()), swarm.held()
    assert not any(swarm.blamed().values()), swarm.blamed()
    assert swarm.engine.ready == len(swarm.experts)
    assert not list(swarm.memory.iterdir()), "segments of shared memory have kept their names"


async def outcome(call: Any) -> tuple[Code, str, list[Any]]:
    """Code, details and answers of a call, with a stream of answers or one. Raises TimeoutError when it hangs."""
    answers = []
    try:
        async with asyncio.timeout(CALL_SECONDS):
            if hasattr(call, "read"):
                async for answer in call:
                    answers.append(answer)  # noqa: PERF401 - what came before an error counts
            else:
                answers.append(await call)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", answers
    return Code.OK, "", answers


async def refused_properly(call: Any) -> tuple[Code, str, list[Any]]:
    """`outcome` of a call to the public service; what is said of a bad request is one line that names the field."""
    code, details, answers = await outcome(call)
    assert details.isprintable(), details
    if code is Code.INVALID_ARGUMENT and not details.startswith("request: "):
        trailing = grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details)
        status = rpc_status.from_call(trailing)  # type: ignore[arg-type]  # it only needs the getters it has
        violation = error_details_pb2.BadRequest()
        assert status is not None
        assert status.details[0].Unpack(violation)
        assert violation.field_violations[0].field
    return code, details, answers


METHODS = ("Generate", "Score", "ListExperts", "ListParticles", "GetStatus")
public_bytes = fuzzing.damaged(fuzzing.generate_requests() | fuzzing.score_requests())


@fuzz(150)
@given(messages=fuzzing.batches(st.tuples(st.sampled_from([*METHODS, "Nothing"]), public_bytes)))
def test_bytes_sent_to_the_public_service(swarm: Swarm, messages: list[tuple[str, bytes]]) -> None:
    async def send() -> list[tuple[Code, str, list[Any]]]:
        paths = [f"/token_swarm.v1.SwarmService/{method}" for method, _ in messages]
        make = {True: swarm.public.unary_stream, False: swarm.public.unary_unary}
        calls = [make["Generate" in path](path)(data) for path, (_, data) in zip(paths, messages, strict=True)]
        return await asyncio.gather(*map(refused_properly, calls))

    sent["public service, bytes"] += len(messages)
    for (method, data), (code, details, _) in zip(messages, swarm.run(send()), strict=True):
        allowed = {Code.UNIMPLEMENTED} if method == "Nothing" else {Code.OK, *REFUSALS}
        assert code in allowed, (method, data, code, details)


@fuzz(70)
@given(messages=fuzzing.batches(fuzzing.generate_requests() | fuzzing.score_requests()))
def test_requests_with_extreme_values(swarm: Swarm, messages: list[Any]) -> None:
    async def send() -> list[tuple[Code, str, list[Any]]]:
        stub = swarm_pb2_grpc.SwarmServiceStub(swarm.public)
        return await asyncio.gather(
            *(
                refused_properly(
                    (stub.Generate if isinstance(message, swarm_pb2.GenerateRequest) else stub.Score)(message)
                )
                for message in messages
            )
        )

    sent["public service, values"] += len(messages)
    for message, (code, details, answers) in zip(messages, swarm.run(send()), strict=True):
        assert code in {Code.OK, *REFUSALS}, (message, code, details)
        if code is Code.OK and isinstance(message, swarm_pb2.GenerateRequest):
            *chunks, last = answers
            text = "".join(chunk.chunk.text for chunk in chunks)
            assert last.HasField("finish")
            # A byte that no character begins with is shown as one character of three bytes.
            assert last.finish.bytes <= len(text.encode()) <= 3 * last.finish.bytes
            if message.HasField("max_bytes"):
                assert last.finish.bytes <= message.max_bytes


# --- What an expert is sent ---------------------------------------------------------------------------------------


async def converse(channel: grpc.aio.Channel, messages: Sequence[bytes]) -> tuple[Code, str, list[bytes]]:
    """Send `messages` on one Decode stream, reading an answer after each; code, details and the answers."""
    call = channel.stream_stream("/token_swarm.v1.ExpertService/Decode")()
    answers: list[bytes] = []
    try:
        async with asyncio.timeout(CALL_SECONDS):
            for message in messages:
                await call.write(message)
                answer = await call.read()
                if answer is END_OF_STREAM:
                    break
                answers.append(answer)
            else:
                await call.done_writing()
            return await call.code(), await call.details() or "", answers
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        # The expert ended the stream between two messages of ours.
        return await call.code(), await call.details() or "", answers


@fuzz(150)
@given(streams=fuzzing.batches(st.lists(fuzzing.damaged(fuzzing.decode_requests), min_size=1, max_size=3)))
def test_bytes_sent_to_an_expert(swarm: Swarm, streams: list[list[bytes]]) -> None:
    async def send() -> list[Any]:
        return await asyncio.gather(*(converse(swarm.internal, stream) for stream in streams))

    sent["expert, bytes"] += sum(map(len, streams))
    for stream, (code, details, _) in zip(streams, swarm.run(send()), strict=True):
        assert code in {Code.OK, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION}, (stream, code, details)
        assert details.isprintable()


@fuzz(150)
@given(streams=fuzzing.batches(st.lists(fuzzing.decode_requests, min_size=1, max_size=4)))
def test_messages_to_an_expert_in_any_order(swarm: Swarm, streams: list[list[Any]]) -> None:
    async def send() -> list[Any]:
        return await asyncio.gather(
            *(converse(swarm.internal, [each.SerializeToString() for each in stream]) for stream in streams)
        )

    sent["expert, order"] += sum(map(len, streams))
    for stream, (code, details, _) in zip(streams, swarm.run(send()), strict=True):
        assert code in {Code.OK, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION}, (stream, code, details)
        assert details.isprintable()


@fuzz(70)
@given(given_steps=st.lists(st.lists(fuzzing.ops, max_size=4), min_size=12, max_size=12))
def test_operations_sent_to_an_expert(swarm: Swarm, given_steps: list[list[Any]]) -> None:
    """A caller that keeps to the protocol may ask for anything: operations are refused one by one."""
    attach = expert_pb2.DecodeRequest(attach=expert_pb2.Attach(transport=expert_pb2.TRANSPORT_INLINE))
    messages = [attach] + [
        expert_pb2.DecodeRequest(step=expert_pb2.Step(number=number, ops=ops))
        for number, ops in enumerate(given_steps, 1)
    ]
    sent["expert, operations"] += len(messages)
    code, details, answers = swarm.run(converse(swarm.internal, [each.SerializeToString() for each in messages]))
    replies = [expert_pb2.DecodeResponse.FromString(answer).step for answer in answers[1:]]
    spec = swarm.experts["e0"].spec
    for number, (ops, reply) in enumerate(zip(given_steps, replies, strict=False), 1):
        assert reply.number == number
        assert len(reply.row_counts) == len(ops)
        assert len(reply.inline) == sum(reply.row_counts) * spec.vocabulary.width * spec.dtype.itemsize
        assert all(error.index < len(ops) and error.message.isprintable() for error in reply.errors)
    if len(replies) < len(given_steps):
        # Only what is no operation ends the stream, and it is named.
        bad = [op for op in given_steps[len(replies)] if (op.open or op.extend) and _rows(op) not in (None, 1, 2, 3)]
        assert bad, (code, details)
        assert code is Code.INVALID_ARGUMENT
        assert details.startswith("ops[")
    else:
        assert code is Code.OK


def test_a_fork_onto_an_open_sequence_is_refused_and_leaks_nothing(swarm: Swarm) -> None:
    """Found here: the fork of a sequence that does not exist made the expert forget the one that did."""
    ops = [
        expert_pb2.Op(open=expert_pb2.OpenOp(sequence=1, tokens=[97], rows=expert_pb2.ROWS_LAST)),
        expert_pb2.Op(fork=expert_pb2.ForkOp(sequence=9, new=1)),
    ]
    messages = [
        expert_pb2.DecodeRequest(attach=expert_pb2.Attach(transport=expert_pb2.TRANSPORT_INLINE)),
        expert_pb2.DecodeRequest(step=expert_pb2.Step(number=1, ops=ops)),
    ]
    code, _, answers = swarm.run(converse(swarm.internal, [each.SerializeToString() for each in messages]))
    assert code is Code.OK
    (error,) = expert_pb2.DecodeResponse.FromString(answers[1]).step.errors
    assert error.kind == expert_pb2.OP_ERROR_KIND_SEQUENCE_EXISTS
    settle(swarm)


def _rows(op: Any) -> int | None:
    kind = op.WhichOneof("op")
    return int(getattr(op, kind).rows) if kind in ("open", "extend") else None


# --- What an expert that lies answers -----------------------------------------------------------------------------


@fuzz(300)
@given(replies=fuzzing.batches(step_replies()))
def test_replies_that_a_lying_expert_makes_up(replies: list[tuple[list[Any], Any]]) -> None:
    sent["lying expert, replies"] += len(replies)
    for ops, reply in replies:
        taken(ops, reply, None)


ROW_BYTES = fuzzing.VOCABULARIES[0].width * 8


@fuzz(60)
@given(
    headers=fuzzing.batches(
        st.tuples(fuzzing.big_counts, st.sampled_from([ROW_BYTES, ROW_BYTES - 8, 0]) | fuzzing.big_counts), 16
    ),
    slots=st.lists(fuzzing.counts, min_size=16, max_size=16),
)
def test_slots_that_are_stale_torn_or_not_there(
    tmp_path_factory: pytest.TempPathFactory, headers: list[tuple[int, int]], slots: list[int]
) -> None:
    """Only a slot with just this step's number and length is read."""
    folder = fuzzing.folder(tmp_path_factory)
    writer = transport.SegmentWriter(folder, ROW_BYTES)
    offer = expert_pb2.Offer(name=writer.name, slots=writer.slots, slot_bytes=ROW_BYTES)
    reader = transport.SegmentReader(folder, offer)
    row = torch.arange(ROW_BYTES // 8, dtype=torch.float64)[None]
    sent["lying expert, slots"] += len(headers)
    for (step, length), slot in zip(headers, slots, strict=True):
        reply = expert_pb2.StepReply(number=1, row_counts=[1], dtype="float64", width=row.shape[1], slot=slot)
        writer.write(1, 1, transport.as_bytes(row))
        writer._headers[1] = (step, length)
        assert taken([Open(1, (97,))], reply, reader) == ((slot, step, length) == (1, 1, ROW_BYTES))
    writer.unlink()
    writer.close()
    reader.close()


def test_a_segment_that_lost_its_memory_is_an_error(tmp_path: Path) -> None:
    """Found here: reading it ended the coordinator with SIGBUS."""
    writer = transport.SegmentWriter(tmp_path, ROW_BYTES)
    reader = transport.SegmentReader(
        tmp_path, expert_pb2.Offer(name=writer.name, slots=writer.slots, slot_bytes=ROW_BYTES)
    )
    os.truncate(tmp_path / writer.name, 0)
    reply = expert_pb2.StepReply(number=1, row_counts=[1], dtype="float64", width=ROW_BYTES // 8, slot=1)
    with pytest.raises(TransportError, match="no longer has its"):
        transport.take_logits(reply, 1, torch.float64, reader, 1)
    reader.close()
    writer.close()


@fuzz(250)
@given(offers=fuzzing.batches(fuzzing.offers))
def test_offers_that_a_lying_expert_makes(tmp_path_factory: pytest.TempPathFactory, offers: list[Any]) -> None:
    folder = fuzzing.folder(tmp_path_factory)
    fuzzing.make_segments(folder)
    sent["lying expert, offers"] += len(offers)
    for offer in offers:
        with contextlib.suppress(TransportError, OSError):
            transport.SegmentReader(folder, offer).close()
            assert (offer.name, offer.slots) == fuzzing.GOOD_OFFER[:2]
            assert 64 < offer.slot_bytes <= 128


@fuzz(250)
@given(data=st.data())
def test_conversations_with_a_lying_expert(swarm: Swarm, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """From the first answer to a step's: connecting fails, or the step does, or both were right; and it ends."""
    spec = swarm.experts["e0"].spec
    memory = transport.shared_memory_identity(swarm.memory)
    truth = wire.spec_to_proto(spec, max_rows=8, shared_memory=memory)
    described = lies(truth, data.draw, fuzzing.description_lies(truth), most=1)
    whole = spec.vocabulary.to_bytes()
    pieces = data.draw(st.sampled_from([[whole]] * 6 + [[], [whole[:-1]], [whole, b"\0"], [b"\xff" * 30]]))
    answers = data.draw(fuzzing.decode_answers)
    liar = swarm.liar
    liar.describe = described.SerializeToString()
    liar.vocabulary = [expert_pb2.GetVocabularyResponse(data=piece).SerializeToString() for piece in pieces]
    liar.decode = answers
    sent["lying expert, conversations"] += 2 + len(answers)

    async def talk() -> None:
        cache = fuzzing.folder(tmp_path_factory)
        connection = await ExpertConnection.connect(liar.address, "e0", cache=cache, wait_seconds=5)
        try:
            result = await connection.step([Open(1, (97,))])
            assert result.logits.shape == (1, spec.vocabulary.width)
        finally:
            await connection.close()

    async def bounded() -> None:
        async with asyncio.timeout(CALL_SECONDS):
            with contextlib.suppress(TransportError, ExpertUnavailable):
                await talk()

    swarm.run(bounded())


def test_ten_thousand_messages_were_sent() -> None:
    if len(sent) < 9:
        pytest.skip("counts the messages of the whole file; run all of its tests")
    print(dict(sent))
    assert sum(sent.values()) >= 10_000 * min(1.0, SCALE)
