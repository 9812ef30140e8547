"""Logits come out of a transport as they went in, and a bad slot, file or message is an error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.expert_protocol import shared_memory as transport
from token_swarm_server.rpc.errors import TransportError

from token_swarm.v1 import expert_pb2

SLOT_BYTES = 100


@pytest.fixture
def segment(tmp_path):
    writer = transport.SegmentWriter(tmp_path, SLOT_BYTES)
    reader = transport.SegmentReader(tmp_path, offer(writer))
    writer.unlink()
    yield writer, reader
    reader.close()
    writer.close()


def offer(writer, **changes):
    fields = {"name": writer.name, "slots": writer.slots, "slot_bytes": writer.slot_bytes} | changes
    return expert_pb2.Offer(**fields)


def reply_for(logits, number=1):
    return expert_pb2.StepReply(number=number, width=logits.shape[1], dtype=wire.dtype_name(logits.dtype))


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_logits_survive_both_transports(segment, dtype, rows):
    writer, reader = segment
    logits = torch.randn(rows, 3, dtype=torch.float64).to(dtype)
    for number in range(1, 5):
        for write_to, read_from, slot in ((writer, reader, number % writer.slots), (writer, reader, None), (None,) * 3):
            reply = reply_for(logits, number)
            transport.put_logits(reply, logits, write_to, slot)
            reply = expert_pb2.StepReply.FromString(reply.SerializeToString())
            assert torch.equal(transport.take_logits(reply, rows, dtype, read_from, slot), logits)
    fits = logits.nbytes <= SLOT_BYTES
    transport.put_logits(reply := reply_for(logits), logits, writer, 0)
    assert reply.WhichOneof("logits") == (None if rows == 0 else "slot" if fits else "inline")


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
def test_rows_that_are_written_where_they_are_read_are_not_copied(segment, dtype, monkeypatch):
    writer, reader = segment
    for number in range(1, 5):
        memory = transport.row_memory(number % writer.slots, 3, dtype, writer)
        logits = memory(4)[:2]
        logits[:] = torch.randn(2, 3)
        reply = reply_for(logits, number)
        with monkeypatch.context() as patch:
            # Had the rows been elsewhere, they would have been put here.
            patch.setattr(writer, "_payloads", Untouchable(writer._payloads))
            transport.put_logits(reply, logits, writer, number % writer.slots)
        taken = transport.take_logits(reply, 2, dtype, reader, number % writer.slots)
        assert torch.equal(taken, logits)
        logits += 1
        assert torch.equal(taken, logits), "the reader reads what the writer wrote, not a copy of it"


class Untouchable:
    """A table of which parts may be had, but not set."""

    def __init__(self, table):
        self._table = table

    def __getitem__(self, key):
        part = self._table[key].view()
        part.flags.writeable = False
        return part


def test_rows_that_no_slot_can_hold_travel_inline(segment):
    logits = transport.row_memory(1, 3, torch.float32, segment[0])(SLOT_BYTES)
    logits[:] = torch.randn(SLOT_BYTES, 3)
    transport.put_logits(reply := reply_for(logits), logits, segment[0], 1)
    assert reply.WhichOneof("logits") == "inline"


def test_a_slot_that_is_being_written_is_void(segment):
    writer, reader = segment
    logits = torch.randn(2, 3)
    transport.put_logits(reply := reply_for(logits, 2), logits, writer, 0)
    transport.row_memory(0, 3, torch.float32, writer)(2)
    with pytest.raises(TransportError, match="slot 0 holds"):
        transport.take_logits(reply, 2, torch.float32, reader, 0)


def test_a_strided_view_is_sent_as_the_rows_it_shows(segment):
    logits = torch.arange(24.0).reshape(4, 6)[::2, ::2]
    reply = reply_for(logits)
    transport.put_logits(reply, logits, segment[0], 2)
    assert torch.equal(transport.take_logits(reply, 2, torch.float32, segment[1], 2), logits)


def test_the_file_is_private_and_its_name_goes(tmp_path):
    writer = transport.SegmentWriter(tmp_path, SLOT_BYTES)
    path = tmp_path / writer.name
    assert path.stat().st_mode & 0o777 == 0o600
    writer.unlink()
    assert not list(tmp_path.iterdir())
    writer.unlink()
    writer.close()
    writer.close()


def test_a_slot_that_was_used_again_is_stale(segment):
    writer, reader = segment
    writer.write(1, 1, np.full(8, 1, np.uint8))
    writer.write(2, 0, np.full(8, 2, np.uint8))
    assert reader.lend(1, 1, 8).tolist() == [1] * 8, "another slot must stay whole"
    writer.write(3, 1, np.full(8, 3, np.uint8))
    with pytest.raises(TransportError, match="step 3, expected 8 bytes of step 1"):
        reader.lend(1, 1, 8)


def test_a_slot_that_is_being_written_is_torn(segment):
    writer, reader = segment
    writer.write(1, 1, np.full(8, 1, np.uint8))
    with pytest.raises(ValueError, match="broadcast"):
        writer.write(2, 1, np.zeros(SLOT_BYTES + 1, np.uint8))
    with pytest.raises(TransportError, match="of step 0"):
        reader.lend(1, 1, 8)


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
@pytest.mark.parametrize(
    "kept",
    [
        lambda logits: logits,
        lambda logits: logits[1],
        lambda logits: logits[1:].view(-1),
        lambda logits: logits.view(torch.uint8).numpy()[0],
    ],
    ids=["all", "a row", "a view", "an array"],
)
def test_a_slot_is_vacant_once_nobody_reads_it(segment, dtype, kept):
    writer, reader = segment
    logits = torch.ones(2, 3, dtype=dtype)
    read = []
    for number in range(1, writer.slots + 1):
        slot = reader.vacant()
        assert slot == number - 1
        transport.put_logits(reply := reply_for(logits, number), logits, writer, slot)
        read.append(kept(transport.take_logits(reply, 2, dtype, reader, slot)))
    assert reader.vacant() is None
    del read[1]
    assert reader.vacant() == 1
    read.clear()
    assert reader.vacant() == 0


def test_logits_outlive_their_segment(segment):
    writer, reader = segment
    logits = torch.randn(2, 3)
    transport.put_logits(reply := reply_for(logits), logits, writer, 0)
    taken = transport.take_logits(reply, 2, torch.float32, reader, 0)
    reader.close()
    writer.close()
    assert torch.equal(taken, logits)


def test_a_slot_that_was_not_asked_for_is_refused(segment):
    writer, reader = segment
    logits = torch.randn(2, 3)
    transport.put_logits(reply := reply_for(logits), logits, writer, 1)
    for asked, text in ((0, "0"), (None, "none")):
        with pytest.raises(TransportError, match=f"slot: 1 was not asked for; it was {text}"):
            transport.take_logits(reply, 2, torch.float32, reader, asked)
    assert reader.vacant() == 0


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2 * SLOT_BYTES))
def test_only_the_step_that_was_written_can_be_read(step, slot, size):
    directory = Path("/dev/shm")
    writer = transport.SegmentWriter(directory, SLOT_BYTES)
    reader = transport.SegmentReader(directory, offer(writer))
    writer.unlink()
    writer.write(7, 1, np.arange(9, dtype=np.uint8))
    try:
        if (step, slot, size) == (7, 1, 9):
            assert reader.lend(step, slot, size).tolist() == list(range(9))
        else:
            with pytest.raises(TransportError):
                reader.lend(step, slot, size)
    finally:
        reader.close()
        writer.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/passwd"},
        {"name": ""},
        {"name": "token-swarm-" + "0" * 32 + "/"},
        {"slots": 0},
        {"slots": 2},
        {"slots": 10**6},
        {"slot_bytes": 0},
        {"slot_bytes": SLOT_BYTES + 64},
        {"slot_bytes": 2**63},
    ],
    ids=repr,
)
def test_an_offer_that_does_not_fit_the_file_is_refused(tmp_path, changes):
    writer = transport.SegmentWriter(tmp_path, SLOT_BYTES)
    with pytest.raises(TransportError):
        transport.SegmentReader(tmp_path, offer(writer, **changes))
    writer.close()


def test_links_and_pipes_are_not_mapped(tmp_path):
    link, pipe = (f"token-swarm-{digit * 32}" for digit in "01")
    (tmp_path / "target").write_bytes(bytes(1000))
    (tmp_path / link).symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / pipe)
    with pytest.raises(OSError, match="symbolic link"):
        transport.SegmentReader(tmp_path, expert_pb2.Offer(name=link, slots=2, slot_bytes=SLOT_BYTES))
    with pytest.raises(TransportError, match="not a file"):
        transport.SegmentReader(tmp_path, expert_pb2.Offer(name=pipe, slots=2, slot_bytes=SLOT_BYTES))


def test_too_little_shared_memory_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        transport.SegmentWriter(tmp_path, SLOT_BYTES)
    assert not list(tmp_path.iterdir())


def test_the_same_directory_of_the_same_machine_is_shared():
    here = transport.shared_memory_identity(Path("/dev/shm"))
    assert here is not None
    assert transport.is_shared(here)
    for field, value in {"boot_id": "0", "device": here.device + 1, "directory": "/nowhere"}.items():
        other = expert_pb2.SharedMemory()
        other.CopyFrom(here)
        setattr(other, field, value)
        assert not transport.is_shared(other), field


@pytest.mark.parametrize("directory", ["", "dev/shm", "/dev\0/shm"])
def test_a_directory_that_cannot_be_is_not_shared(directory):
    assert not transport.is_shared(expert_pb2.SharedMemory(directory=directory))


@given(st.binary(max_size=60), st.integers(1, 4), st.booleans())
def test_garbage_is_never_logits(data, rows, shared):
    directory = Path("/dev/shm")
    try:
        reply = expert_pb2.StepReply.FromString(data)
    except DecodeError:
        return
    reply.width = 5
    writer = transport.SegmentWriter(directory, SLOT_BYTES)
    reader = transport.SegmentReader(directory, offer(writer)) if shared else None
    writer.unlink()
    try:
        if len(reply.inline) == rows * 5 * 4:
            return
        with pytest.raises(TransportError):
            transport.take_logits(reply, rows, torch.float32, reader, reply.slot)
    finally:
        if reader is not None:
            reader.close()
        writer.close()


@given(st.integers(0, 3), st.integers(0, 2**32 - 1), st.integers(0, 3), st.binary(max_size=40))
def test_bytes_of_another_size_are_refused(rows, width, shrink, data):
    reply = expert_pb2.StepReply(number=1, width=width, inline=data)
    size = rows * width * 2
    if rows and len(data) == size:
        assert transport.take_logits(reply, rows, torch.bfloat16, None, None).shape == (rows, width)
    else:
        with pytest.raises(TransportError):
            transport.take_logits(reply, rows, torch.bfloat16, None, None)
