"""What the fuzz tests share: a swarm in a thread of its own, messages that no client means, and an expert that lies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from hypothesis import strategies as st
from token_swarm_server.config.loading import load_settings
from token_swarm_server.coordinator.engine import Engine
from token_swarm_server.coordinator.server import CoordinatorServer
from token_swarm_server.expert_server.server import ExpertServer

from token_swarm.experts.contract import Expert
from token_swarm.experts.toy import ToyExpert
from token_swarm.v1 import expert_pb2, swarm_pb2
from token_swarm.vocabulary import Vocabulary

_T = TypeVar("_T")
CONTEXT = 48
ALL_BYTES = [bytes((byte,)) for byte in range(256)]
VOCABULARIES = (
    Vocabulary((*ALL_BYTES, b"ab", b"abc", b"ab", "é".encode(), b" the", None, None), eos_ids=(261,)),
    Vocabulary((*ALL_BYTES, b"bc", b"cab", "日本".encode(), b"\xe6\x97", None), eos_ids=(260,)),
)
sent: Counter[str] = Counter()
"""Messages sent, by what they were meant to break."""


class Loop:
    """An event loop in a thread, for servers that are called from plain tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T], seconds: float = 60.0) -> _T:
        """The coroutine's result. Raises TimeoutError: nothing here may hang."""
        future: Future[_T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(seconds)

    def close(self) -> None:
        """Stop the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Swarm:
    """Two toy experts behind expert servers, and a coordinator before them, all over real gRPC."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self.loop = loop
        self.experts: dict[str, Expert] = {
            f"e{i}": ToyExpert(f"e{i}", vocabulary, seed=i, order=2, sharpness=2.0, max_context=CONTEXT)
            for i, vocabulary in enumerate(VOCABULARIES)
        }
        self.memory = Path(tempfile.mkdtemp(prefix="token-swarm-fuzz-", dir="/dev/shm"))
        self._folder = folder
        loop.run(self._start())

    async def _start(self) -> None:
        # Here, since a server of grpc.aio belongs to the loop that it is made in.
        self.servers = {
            name: ExpertServer(expert, f"unix:{self._folder}/{name}/socket", directory=self.memory)
            for name, expert in self.experts.items()
        }
        for server in self.servers.values():
            await server.start()
        settings = load_settings(
            None,
            experts={name: {"address": server.address} for name, server in self.servers.items()},
            coordinator={"listen": "127.0.0.1:0", "max_seconds": 10.0},
            cache=self._folder / "cache",
        )
        self.engine = await Engine.connect({name: each.address for name, each in self.servers.items()}, settings)
        self.server = CoordinatorServer(settings, self.engine)
        await self.server.start()
        self.liar = Liar(self._folder)
        await self.liar.start()
        self.public = grpc.aio.insecure_channel(self.server.address)
        self.internal = grpc.aio.insecure_channel(self.servers["e0"].address)

    async def _stop(self) -> None:
        await self.public.close()
        await self.internal.close()
        await self.liar.stop()
        await self.server.stop(0)
        for server in self.servers.values():
            await server.stop()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """The coroutine's result, from the loop of the servers: grpc's other clients do not go with grpc.aio."""
        return self.loop.run(coroutine)

    def close(self) -> None:
        """Stop everything."""
        self.loop.run(self._stop())
        with contextlib.suppress(OSError):
            self.memory.rmdir()

    def held(self) -> dict[str, int]:
        """What is in use now: everything must be 0 once no call is under way."""
        sequences = {f"sequences of {name}": each.stats().sequences for name, each in self.experts.items()}
        free = {
            f"admission of {name}": each.spec.max_sequences - self.engine.admission.free(name)
            for name, each in self.experts.items()
        }
        return sequences | free | {"running": self.engine.running, "waiting": self.engine.admission.waiting}

    def blamed(self) -> dict[str, int]:
        """How often an expert was given up: no request may bring that about."""
        return {name: link.restarts for name, link in self.engine.links.items()}


# --- Messages -----------------------------------------------------------------------------------------------------

numbers = st.sampled_from(
    [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 0.5, -1.0, 1e308, -1e308, 1e-300, 5e-324, 1e-9, 300.0]
) | st.floats(-4, 4)
counts = st.sampled_from([0, 1, 2, 3, 7, 31, 2**31 - 1, 2**31, 2**32 - 1])
big_counts = counts | st.sampled_from([2**53 + 1, 2**63, 2**64 - 1])
hostile = st.sampled_from(["", "\0", "../../etc/passwd", "%s%n{0}", "a\r\nx: y", "\u202e🙂", "ab" * 40, "z" * 9000])
words = st.sampled_from(["a", "ab", "abc the", "é日本"]) | hostile | st.text(max_size=8)
# A proto3 enum carries any number.
enums = st.integers(0, 6) | st.sampled_from([-1, 2**31 - 1])
names = st.sampled_from(["e0", "e1"]) | words


def maybe(values: st.SearchStrategy[_T]) -> st.SearchStrategy[_T | None]:
    """A field that is often absent."""
    return st.none() | values


mixtures = st.builds(
    swarm_pb2.Mixture,
    rule=enums,
    weights=st.lists(
        st.builds(swarm_pb2.ExpertWeight, expert=names, weight=numbers, temperature=maybe(numbers)), max_size=3
    ),
)
samplings = st.builds(
    swarm_pb2.Sampling,
    temperature=maybe(numbers),
    top_k=maybe(counts),
    top_p=maybe(numbers),
    min_p=maybe(numbers),
    seed=maybe(big_counts),
)


@st.composite
def generate_requests(draw: st.DrawFn) -> swarm_pb2.GenerateRequest:
    """A valid request in which some fields are not."""
    request = swarm_pb2.GenerateRequest(prompt="ab", max_bytes=6)
    wrong = draw(st.sets(st.sampled_from([each.name for each in request.DESCRIPTOR.fields]), max_size=4))
    values: dict[str, st.SearchStrategy[Any]] = {
        "request_id": words, "prompt": words, "chat": st.booleans(), "particle": words, "mixture": mixtures,
        "unit": enums, "sampling": samplings, "max_bytes": big_counts, "max_tokens": big_counts,
        "stop": st.lists(words, max_size=3), "epsilon": numbers, "on_expert_failure": enums,
        "draft_tokens": counts,
    }  # fmt: skip
    for field in sorted(wrong):
        set_field(request, field, draw(values[field]))
    return request


@st.composite
def score_requests(draw: st.DrawFn) -> swarm_pb2.ScoreRequest:
    """A valid request in which some fields are not."""
    request = swarm_pb2.ScoreRequest(prompt="ab", text="abc the")
    wrong = draw(st.sets(st.sampled_from([each.name for each in request.DESCRIPTOR.fields]), max_size=4))
    values: dict[str, st.SearchStrategy[Any]] = {
        "request_id": words, "prompt": words, "text": words, "chat": st.booleans(), "particle": words,
        "mixture": mixtures, "per_byte": st.booleans(), "stride": big_counts,
    }  # fmt: skip
    for field in sorted(wrong):
        set_field(request, field, draw(values[field]))
    return request


def set_field(message: Message, field: str, value: Any) -> None:
    """Give a field of any kind a value."""
    if isinstance(value, Message):
        getattr(message, field).CopyFrom(value)
    elif isinstance(value, list):
        getattr(message, field).extend(value)
    else:
        setattr(message, field, value)


@st.composite
def damaged(draw: st.DrawFn, messages: st.SearchStrategy[Message]) -> bytes:
    """The bytes of a message with some of them changed, taken out or put in; or bytes of no message at all."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=40))
    data = bytearray(draw(messages).SerializeToString()[:200])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        # A surrogate in UTF-8, a length beyond the end, an unknown wire type and a field number of 0 among them.
        piece = draw(st.sampled_from([b"", b"\xed\xa0\x80", b"\xff\xff\xff\xff\x0f", b"\x07", b"\x00", b"\x12\x7f"]))
        data[at : at + draw(st.integers(0, 2))] = piece or draw(st.binary(min_size=1, max_size=2))
    return bytes(data)


tokens = st.lists(st.integers(0, 259) | st.sampled_from([-1, 260, 261, 2**31 - 1, -(2**31)]), max_size=6)
sequences = st.integers(0, 3) | st.sampled_from([2**63, 2**64 - 1])
# Mostly what exists: an operation that is refused for its rows says nothing about the others.
row_kinds = st.sampled_from([expert_pb2.ROWS_NONE, expert_pb2.ROWS_LAST, expert_pb2.ROWS_ALL] * 6 + [0, 4, -1])
ops = st.one_of(
    st.builds(
        lambda sequence, given, rows: expert_pb2.Op(open=expert_pb2.OpenOp(sequence=sequence, tokens=given, rows=rows)),
        sequences,
        tokens | st.just([1] * 60),
        row_kinds,
    ),
    st.builds(
        lambda sequence, given, rows: expert_pb2.Op(
            extend=expert_pb2.ExtendOp(sequence=sequence, tokens=given, rows=rows)
        ),
        sequences,
        tokens | st.just([2] * 3000),
        row_kinds,
    ),
    st.builds(
        lambda sequence, new: expert_pb2.Op(fork=expert_pb2.ForkOp(sequence=sequence, new=new)), sequences, sequences
    ),
    st.builds(
        lambda sequence, length: expert_pb2.Op(truncate=expert_pb2.TruncateOp(sequence=sequence, length=length)),
        sequences,
        st.sampled_from([0, 1, 2, 5, -1, 2**31 - 1, -(2**31)]),
    ),
    st.builds(lambda sequence: expert_pb2.Op(close=expert_pb2.CloseOp(sequence=sequence)), sequences),
)
attaches = st.builds(lambda way: expert_pb2.DecodeRequest(attach=expert_pb2.Attach(transport=way)), enums)
mappeds = st.builds(lambda ok: expert_pb2.DecodeRequest(mapped=expert_pb2.Mapped(success=ok)), st.booleans())
steps = st.builds(
    lambda number, given: expert_pb2.DecodeRequest(step=expert_pb2.Step(number=number, ops=given)),
    st.integers(0, 4) | big_counts,
    st.lists(ops | st.just(expert_pb2.Op()), max_size=4),
)
decode_requests = attaches | mappeds | steps | st.just(expert_pb2.DecodeRequest())


# --- An expert that lies ------------------------------------------------------------------------------------------


GOOD_OFFER = (f"token-swarm-{'a' * 32}", 2, 100)
SHORT, FIFO, LINK = (f"token-swarm-{letter * 32}" for letter in "bcd")
offers = st.builds(
    expert_pb2.Offer,
    name=st.sampled_from([GOOD_OFFER[0], SHORT, FIFO, LINK, f"token-swarm-{'e' * 32}", f"../{GOOD_OFFER[0]}"]) | words,
    slots=st.sampled_from([0, 1, 2, 16, 17, 2**32 - 1]),
    slot_bytes=st.sampled_from([0, 1, 100, 101, 2**28, 2**28 + 1, 2**63, 2**64 - 1]),
)


def folder(factory: Any) -> Path:
    """One folder for all examples of a session."""
    path: Path = factory.getbasetemp() / "fuzzed"
    path.mkdir(exist_ok=True)
    return path


def make_segments(directory: Path) -> None:
    """Files under names that an offer may have: a whole one, a short one, a pipe, and a link out of the folder."""
    if (directory / SHORT).exists():
        return
    name, slots, slot_bytes = GOOD_OFFER
    (directory / name).write_bytes(bytes(slots * (64 + -(-slot_bytes // 64) * 64)))
    (directory / SHORT).write_bytes(b"x")
    os.mkfifo(directory / FIFO)
    (directory / LINK).symlink_to("/etc/passwd")


def description_lies(truth: expert_pb2.DescribeResponse) -> dict[str, st.SearchStrategy[Any]]:
    """What an expert may say of itself."""
    memory = st.builds(
        expert_pb2.SharedMemory,
        boot_id=st.just(truth.shared_memory.boot_id) | words,
        directory=st.just(truth.shared_memory.directory) | words,
        device=big_counts,
    )
    return {
        "name": words, "architecture": words, "fingerprint": words | st.just("0" * 64), "width": counts,
        "canonical": words, "max_context": counts, "max_sequences": counts,
        "dtype": words | st.just("bfloat16"), "has_chat_template": st.booleans(), "max_rows_per_step": counts,
        "shared_memory": memory,
    }  # fmt: skip


_replies = st.builds(
    expert_pb2.StepReply,
    number=st.just(1) | big_counts,
    row_counts=st.just([1]) | st.lists(counts, max_size=3),
    dtype=st.just("float64") | words,
    width=st.just(VOCABULARIES[0].width) | counts,
    inline=st.just(bytes(8 * VOCABULARIES[0].width)) | st.binary(max_size=9),
    seconds=numbers,
    batch_size=counts,
)
_answers = st.one_of(
    offers.map(lambda offer: expert_pb2.DecodeResponse(offer=offer)),
    enums.map(lambda way: expert_pb2.DecodeResponse(attached=expert_pb2.Attached(transport=way))),
    _replies.map(lambda reply: expert_pb2.DecodeResponse(step=reply)),
)
_INLINE = expert_pb2.DecodeResponse(attached=expert_pb2.Attached(transport=expert_pb2.TRANSPORT_INLINE))
decode_answers = st.one_of(
    st.lists(damaged(_answers), max_size=3),
    st.lists(_answers.map(lambda message: message.SerializeToString()), max_size=3),
    _replies.map(lambda reply: [m.SerializeToString() for m in (_INLINE, expert_pb2.DecodeResponse(step=reply))]),
)
"""What an expert may answer on a Decode stream: nonsense from the start, or only once it has attached."""


class Liar:
    """A gRPC server that looks like an expert's and answers what it was told to, byte for byte."""

    def __init__(self, folder: Path) -> None:
        self.describe = b""
        self.vocabulary: Sequence[bytes] = ()
        self.decode: Sequence[bytes] = ()
        self.address = f"unix:{folder}/liar"

    async def start(self) -> None:
        """Listen."""
        self._server = grpc.aio.server()

        async def describe(request: bytes, context: Any) -> bytes:
            return self.describe

        async def vocabulary(request: bytes, context: Any) -> Any:
            for piece in self.vocabulary:
                yield piece

        async def decode(requests: Any, context: Any) -> Any:
            answers = iter(self.decode)
            async for _ in requests:
                answer = next(answers, None)
                if answer is None:
                    return
                yield answer

        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(describe),
            "GetVocabulary": grpc.unary_stream_rpc_method_handler(vocabulary),
            "Decode": grpc.stream_stream_rpc_method_handler(decode),
        }
        generic = grpc.method_handlers_generic_handler("token_swarm.v1.ExpertService", handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        """End every call."""
        await self._server.stop(0)


def batches(messages: st.SearchStrategy[_T], size: int = 8) -> st.SearchStrategy[list[_T]]:
    """Messages by the handful: one example of hypothesis costs more than one message."""
    return st.lists(messages, min_size=size, max_size=size)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Swarm]:
    """A swarm, stopped afterwards."""
    loop = Loop()
    swarm = Swarm(loop, folder)
    try:
        yield swarm
    finally:
        swarm.close()
        loop.close()
