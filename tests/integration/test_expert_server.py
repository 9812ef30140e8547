"""An expert behind gRPC is the expert itself, to many callers at a time, whatever happens to either side."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.expert_protocol import shared_memory as transport
from token_swarm_server.expert_server.server import SERVICE, SLOT_ROWS, ExpertServer
from token_swarm_server.rpc.errors import ExpertUnavailable, TransportError

from tests.integration.expert_serving import (
    SHM,
    VOCABULARY,
    Watched,
    Writing,
    connected,
    eventually,
    every_transport,
    serving,
    toy,
)
from token_swarm.errors import BadParameter
from token_swarm.experts import laws
from token_swarm.experts.contract import Close, Extend, Fork, Open, OpErrorKind, Rows
from token_swarm.v1 import expert_pb2, expert_pb2_grpc
from token_swarm.vocabulary import Vocabulary


class Remote:
    """The expert contract over a connection, for the laws: one thread asks, the event loop answers."""

    def __init__(self, connection, loop):
        self.spec = connection.spec
        self._connection, self._loop = connection, loop

    def step(self, ops):
        return asyncio.run_coroutine_threadsafe(self._connection.step(ops), self._loop).result(20)


@every_transport
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
async def test_the_laws_of_an_expert_hold_over_the_wire(tmp_path, prefer, law):
    async with serving(toy(), tmp_path) as server, connected(server, tmp_path, prefer) as connection:
        assert connection.transport == prefer
        remote = Remote(connection, asyncio.get_running_loop())
        await asyncio.to_thread(law, remote, np.random.default_rng(0), 0.0)


@every_transport
@pytest.mark.parametrize("rows", [1, SLOT_ROWS, SLOT_ROWS + 1])
async def test_rows_are_those_of_the_expert(tmp_path, prefer, rows):
    ops = [Open(0, (1, 2, 3) * 20, Rows.NONE), Extend(0, (4,) * rows, Rows.ALL)]
    local = Watched().step(ops)
    async with serving(Watched(), tmp_path) as server, connected(server, tmp_path, prefer) as connection:
        remote = await connection.step(ops)
        assert torch.equal(remote.logits, local.logits)
        assert (remote.spans, remote.errors) == (local.spans, local.errors)
        assert remote.batch_size == 1
        assert remote.seconds > 0


async def test_shared_memory_is_the_default_where_it_can_be_had(tmp_path):
    async with serving(toy(), tmp_path) as server, connected(server, tmp_path) as connection:
        assert connection.transport == expert_pb2.TRANSPORT_SHARED_MEMORY
    async with (
        serving(toy(), tmp_path, directory=tmp_path / "missing") as server,
        connected(server, tmp_path) as connection,
    ):
        assert connection.transport == expert_pb2.TRANSPORT_INLINE
        assert (await connection.step([Open(0, (1,))])).logits.shape == (1, VOCABULARY.width)
        with pytest.raises(ExpertUnavailable, match="shared memory"):
            async with connected(server, tmp_path, expert_pb2.TRANSPORT_SHARED_MEMORY):
                pass


async def test_a_caller_that_cannot_map_the_file_gets_logits_inline(tmp_path):
    async with serving(toy(), tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = expert_pb2_grpc.ExpertServiceStub(channel).Decode()
        await call.write(expert_pb2.DecodeRequest(attach=expert_pb2.Attach()))
        offer = (await call.read()).offer
        assert (SHM / offer.name).exists()
        await call.write(expert_pb2.DecodeRequest(mapped=expert_pb2.Mapped(success=False)))
        assert (await call.read()).attached.transport == expert_pb2.TRANSPORT_INLINE
        assert not (SHM / offer.name).exists()


async def test_spec_encode_and_tokenize_are_those_of_the_expert(tmp_path):
    expert = toy()
    async with serving(expert, tmp_path) as server, connected(server, tmp_path) as connection:
        assert connection.spec == expert.spec
        for text in ("", "abcab"):
            assert await connection.tokenize(text) == expert.tokenize(text)
            for chat in (False, True):
                assert await connection.encode(text, chat=chat) == expert.encode(text, chat=chat)
        for ask in (connection.encode, connection.tokenize):
            with pytest.raises(BadParameter, match="no token of toy writes"):
                await ask("xyz")
            with pytest.raises(BadParameter, match="surrogates"):
                await ask("\ud800")
        assert await connection.tokenize("ab") == expert.tokenize("ab"), "the server must live on"


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
async def test_the_laws_hold_for_an_expert_that_writes_its_rows_where_they_are_read(tmp_path, law):
    expert = Writing()
    async with serving(expert, tmp_path) as server, connected(server, tmp_path) as connection:
        remote = Remote(connection, asyncio.get_running_loop())
        await asyncio.to_thread(law, remote, np.random.default_rng(0), 0.0)
    assert expert.placed


async def test_a_vocabulary_that_is_known_is_neither_read_nor_held_twice(tmp_path):
    async with serving(toy(), tmp_path) as server:
        connection = await ExpertConnection.connect(server.address, "toy", cache=tmp_path / "cache", known=VOCABULARY)
        assert connection.spec.vocabulary is VOCABULARY
        await connection.close()
        assert not (tmp_path / "cache").exists()
        other = Vocabulary((*VOCABULARY.token_bytes, None), eos_ids=VOCABULARY.eos_ids)
        connection = await ExpertConnection.connect(server.address, "toy", cache=tmp_path / "cache", known=other)
        assert connection.spec.vocabulary == VOCABULARY
        await connection.close()


async def test_the_vocabulary_is_cached_and_a_damaged_cache_is_replaced(tmp_path):
    async with serving(toy(), tmp_path) as server:
        async with connected(server, tmp_path):
            pass
        (file,) = (tmp_path / "cache").iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        async with connected(server, tmp_path) as connection:
            assert connection.spec.vocabulary == VOCABULARY
        assert file.read_bytes() == whole
        before = file.stat().st_mtime_ns
        async with connected(server, tmp_path):
            assert file.stat().st_mtime_ns == before
        assert [file] == list((tmp_path / "cache").iterdir())


async def test_another_expert_at_the_address_is_refused(tmp_path):
    async with serving(toy(), tmp_path) as server:
        with pytest.raises(TransportError, match="is expert 'toy', expected 'llama'"):
            await ExpertConnection.connect(server.address, "llama", cache=tmp_path)
    with pytest.raises(ExpertUnavailable, match="'toy'"):
        await ExpertConnection.connect(f"unix:{tmp_path}/nobody", "toy", cache=tmp_path, wait_seconds=0.1)


async def test_streams_have_sequences_of_their_own(tmp_path):
    async with (
        serving(Watched(), tmp_path) as server,
        connected(server, tmp_path) as one,
        connected(server, tmp_path) as two,
    ):
        assert (await one.step([Open(7, (1, 2))])).errors == (None,)
        refused, opened, clash, self_clash = (
            await two.step([Extend(7, (1,)), Open(7, (3,)), Open(7, (3,)), Fork(7, 7)])
        ).errors
        assert refused.kind is OpErrorKind.UNKNOWN_SEQUENCE
        assert opened is None
        assert clash.kind is self_clash.kind is OpErrorKind.SEQUENCE_EXISTS
        for error in (refused, clash, self_clash):
            assert "7" in error.message
            assert str(2**64 + 7) not in error.message, "the caller does not know this id"


async def test_a_stream_that_ends_frees_its_sequences_and_only_these(tmp_path):
    expert = Watched()
    async with serving(expert, tmp_path) as server, connected(server, tmp_path) as other:
        await other.step([Open(0, (1,))])
        async with connected(server, tmp_path) as connection:
            await connection.step([Open(0, (1,)), Open(1, (2,)), Fork(1, 2), Close(0), Open(2, (1,))])
            assert len(expert.held) == 3
        await eventually(lambda: len(expert.held) == 1)
        assert (await other.step([Extend(0, (2,))])).errors == (None,)


async def test_what_a_step_opens_after_its_caller_left_is_freed(tmp_path):
    expert = Watched()
    async with serving(expert, tmp_path) as server:
        async with connected(server, tmp_path) as connection:
            expert.gate.clear()
            expert.entered.clear()
            step = asyncio.create_task(connection.step([Open(0, (1,))]))
            await asyncio.to_thread(expert.entered.wait, 10)
        with pytest.raises((ExpertUnavailable, asyncio.CancelledError)):
            await step
        expert.gate.set()
        await eventually(lambda: len(expert.steps) == 2)
        assert not expert.held


async def test_a_model_that_fails_ends_its_callers_streams_and_tells_them_no_secrets(tmp_path):
    expert = Watched()
    async with serving(expert, tmp_path) as server:
        async with connected(server, tmp_path) as connection:
            await connection.step([Open(0, (1,))])
            expert.broken = True
            with pytest.raises(TransportError) as caught:
                await connection.step([Extend(0, (1,))])
            assert "secret" not in str(caught.value)
            await asyncio.wait_for(connection.wait_lost(), 10)
        await eventually(lambda: not expert.held)
        async with connected(server, tmp_path) as connection:
            assert (await connection.step([Open(0, (1,))])).errors == (None,)


@pytest.mark.parametrize(
    "requests",
    [
        [expert_pb2.DecodeRequest()],
        [expert_pb2.DecodeRequest(step=expert_pb2.Step(number=1))],
        ["attach", expert_pb2.DecodeRequest(attach=expert_pb2.Attach())],
        ["attach", expert_pb2.DecodeRequest(step=expert_pb2.Step(number=2))],
        ["attach", expert_pb2.DecodeRequest(step=expert_pb2.Step(number=1, ops=[expert_pb2.Op()]))],
        ["attach", expert_pb2.DecodeRequest(step=expert_pb2.Step(number=1, slot=0))],
    ],
    ids=["nothing", "step before attach", "attach twice", "wrong number", "no operation", "slot of no file"],
)
async def test_a_caller_that_breaks_the_protocol_is_told(tmp_path, requests):
    inline = expert_pb2.DecodeRequest(attach=expert_pb2.Attach(transport=expert_pb2.TRANSPORT_INLINE))
    async with serving(toy(), tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = expert_pb2_grpc.ExpertServiceStub(channel).Decode()
        for request in requests:
            await call.write(inline if request == "attach" else request)
        # The status comes after the messages, so these are read first.
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read():
                pass
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        async with connected(server, tmp_path) as connection:
            assert (await connection.step([Open(0, (1,))])).errors == (None,)


async def test_logits_that_are_kept_stay_whole_and_the_next_travel_inline(tmp_path):
    async with serving(Writing(), tmp_path) as server, connected(server, tmp_path) as connection:
        local = Watched()
        ops = [[Open(0, (1,))], *([Extend(0, (token,))] for token in range(1, 8))]
        kept = [await connection.step(step) for step in ops]
        expected = [local.step(step).logits for step in ops]
        assert [result.inline for result in kept] == [False] * transport.SLOTS + [True] * (8 - transport.SLOTS)
        for result, logits in zip(kept, expected, strict=True):
            assert torch.equal(result.logits, logits)
        row = kept[1].rows(0)[0]
        del kept, result
        for token in range(8):
            again = await connection.step([Extend(0, (token,))])
            assert not again.inline
        assert torch.equal(row, expected[1][0])


async def test_who_keeps_no_rows_keeps_no_slot(tmp_path):
    async with serving(Writing(), tmp_path) as server, connected(server, tmp_path) as connection:
        kept = []
        for sequence in range(2 * transport.SLOTS):
            result = await connection.step([Open(sequence, (1,)), Extend(sequence, (2,), Rows.NONE)])
            assert not result.inline
            kept.append(result.rows(1))
            del result
        assert [rows.shape for rows in kept] == [(0, VOCABULARY.width)] * len(kept)


async def test_a_step_for_a_slot_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transport.SegmentReader, "vacant", lambda _: transport.SLOTS)
    async with serving(toy(), tmp_path) as server, connected(server, tmp_path) as connection:
        with pytest.raises(TransportError, match=f"asks for slot {transport.SLOTS} of {transport.SLOTS}"):
            await connection.step([Open(0, (1,))])


async def test_a_step_with_too_many_rows_is_refused_on_both_ends(tmp_path):
    async with serving(toy(), tmp_path) as server, connected(server, tmp_path) as connection:
        tokens = (1,) * (connection.max_rows + 1)
        with pytest.raises(BadParameter, match="logit rows"):
            await connection.step([Open(0, tokens, Rows.ALL)])
        connection.max_rows *= 2
        with pytest.raises(TransportError, match=f"at most {len(tokens) - 1}"):
            await connection.step([Open(0, tokens, Rows.ALL)])


# Health and addresses


async def test_health_and_reflection(tmp_path):
    async with serving(toy(), tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        for name in ("", SERVICE):
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        async for answer in stub.ServerReflectionInfo(iter([request])):
            assert SERVICE in {service.name for service in answer.list_services_response.service}


@pytest.mark.parametrize(
    "address",
    ["unix:relative", f"unix:/{'x' * 120}", "0.0.0.0:80", "127.0.0.1", "127.0.0.1:99999", "example.org:80", ""],
)
def test_an_address_that_cannot_be_used_is_refused(address):
    with pytest.raises(BadParameter, match=r"address: .* must be unix:"):
        ExpertServer(toy(), address)


async def test_an_address_in_use_is_refused(tmp_path):
    async with serving(toy(), tmp_path) as server:
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        with pytest.raises(BadParameter, match="no other server"):
            ExpertServer(toy(), server.address)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadParameter, match="free"):
            await ExpertServer(toy(), f"127.0.0.1:{port}").start()


async def test_a_free_port_is_chosen_and_the_expert_closed_in_the_end(tmp_path):
    expert = Watched()
    server = ExpertServer(expert, "127.0.0.1:0")
    await server.start()
    async with connected(server, tmp_path) as connection:
        assert (await connection.step([Open(0, (1,))])).errors == (None,)
    await server.stop()
    assert expert.closed
