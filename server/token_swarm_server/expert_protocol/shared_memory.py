"""How logits travel between an expert's process and the coordinator: a mapped file, or inside the message.

The file lies in a memory-backed directory under an unpredictable name, is private to the user, and loses its
name as soon as both ends have mapped it, so that a crash leaves nothing behind.

Logits are read where the expert wrote them: the reader, who knows what nobody reads any more, names the slot that a
step may fill. A slot starts with the number of the step it holds, which the writer clears first and sets last and the
reader checks: one that is stale or half written is an error, never wrong logits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import stat
import weakref
from pathlib import Path

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from token_swarm import memory
from token_swarm.experts.contract import RowMemory
from token_swarm.v1 import expert_pb2
from token_swarm_server.rpc.errors import TransportError

# What reading a finished grpc.aio stream returns; the stubs do not know it.
END_OF_STREAM = grpc.aio.EOF  # type: ignore[attr-defined]
MAX_MESSAGE_BYTES = 256 * 2**20
SLOTS = 3
"""One that is being filled, one with what was filled last, and one for texts that wait for another expert."""
# A cache line, so that rows start aligned. It holds two uint64: the step's number and the bytes that follow.
_HEADER_BYTES = 64
_NAME = re.compile(r"token-swarm-[0-9a-f]{32}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def shared_memory_identity(directory: Path) -> expert_pb2.SharedMemory | None:
    """Identity of a memory-backed directory, or None where the machine has no such thing."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
        device = directory.stat().st_dev
    except OSError:
        return None
    if not os.access(directory, os.W_OK | os.X_OK):
        return None
    return expert_pb2.SharedMemory(boot_id=boot_id, directory=str(directory), device=device)


def is_shared(remote: expert_pb2.SharedMemory) -> bool:
    """Whether this process sees the same directory of the same machine as the process that sent `remote`.

    Containers on one machine share the boot id, but each has its own device under the same path.
    """
    if not remote.directory.startswith("/") or "\0" in remote.directory:
        return False
    return shared_memory_identity(Path(remote.directory)) == remote


def as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor as uint8 [bytes]; numpy itself does not know bfloat16."""
    view: NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return view


class _Segment:
    """A mapped file of `slots` slots that hold `slot_bytes` bytes of logits each."""

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        stride = self.stride(slot_bytes)
        # Both ends may write: logits are a tensor like any other to those who read them.
        self._map = mmap.mmap(descriptor, slots * stride, access=mmap.ACCESS_WRITE)
        memory = np.frombuffer(self._map, dtype=np.uint8).reshape(slots, stride)
        # One aligned 8-byte store or load each: numpy does not tear them, as struct's byte order codes would.
        self._headers = memory[:, :16].view(np.uint64)
        self._payloads = memory[:, _HEADER_BYTES : _HEADER_BYTES + slot_bytes]

    @staticmethod
    def stride(slot_bytes: int) -> int:
        """Bytes from one slot to the next: the header and the payload, in whole cache lines."""
        return _HEADER_BYTES + -(-slot_bytes // _HEADER_BYTES) * _HEADER_BYTES

    def close(self) -> None:
        """Unmap. The segment cannot be used after that; closing twice does nothing."""
        self._headers = np.empty((0, 0), dtype=np.uint64)
        self._payloads = np.empty((0, 0), dtype=np.uint8)
        # Rows that somebody still reads keep the memory mapped for as long as they live.
        with contextlib.suppress(BufferError):
            self._map.close()


class SegmentWriter(_Segment):
    """The expert's end. `name`: of the file in `directory`."""

    def __init__(self, directory: Path, slot_bytes: int) -> None:
        """Create the file. Raises OSError, such as for too little shared memory."""
        self.name = f"token-swarm-{secrets.token_hex(16)}"
        self._path = directory / self.name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, 0o600)
        try:
            # Reserved now: a full file system is an error here, and a fatal signal at the first write.
            os.posix_fallocate(descriptor, 0, SLOTS * self.stride(slot_bytes))
            super().__init__(descriptor, SLOTS, slot_bytes)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        """Take the name away; what is mapped stays mapped."""
        self._path.unlink(missing_ok=True)

    def room(self, slot: int, size: int) -> NDArray[np.uint8]:
        """So many bytes of a slot, to put logits there at once. What the slot held is void from here on."""
        self._headers[slot][0] = 0
        return self._payloads[slot, :size]

    def write(self, step: int, slot: int, data: NDArray[np.uint8]) -> None:
        """Put the logits of a step (at least 1) into a slot, unless they are there."""
        header = self._headers[slot]
        header[0] = 0
        payload = self._payloads[slot, : len(data)]
        if payload.ctypes.data != data.ctypes.data:
            payload[:] = data
        header[1] = len(data)
        header[0] = step


class SegmentReader(_Segment):
    """The coordinator's end.

    An expert that takes memory away from its file before it answers is found out; one that does so while its logits are
    read would end this process with SIGBUS. Whoever can do that runs as the same user: an expert that is not trusted so
    far belongs on TCP, where logits travel inside messages.
    """

    def __init__(self, directory: Path, offer: expert_pb2.Offer) -> None:
        """Map the offered file. Raises TransportError for a bad offer and OSError if it cannot be mapped."""
        if not _NAME.fullmatch(offer.name):
            raise TransportError(f"offer.name: {offer.name[:80]!r} is not the name of a segment")
        if not 1 <= offer.slots <= 16 or not 1 <= offer.slot_bytes <= MAX_MESSAGE_BYTES:
            raise TransportError(
                f"offer: {offer.slots} slots of {offer.slot_bytes} bytes; allowed are 1 to 16 slots of up to "
                f"{MAX_MESSAGE_BYTES} bytes"
            )
        self._size = offer.slots * self.stride(offer.slot_bytes)
        descriptor = os.open(
            directory / offer.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != self._size:
                raise TransportError(f"offer: {offer.name} is not a file of {self._size} bytes")
            super().__init__(descriptor, offer.slots, offer.slot_bytes)
        finally:
            os.close(descriptor)
        self._lent: set[int] = set()

    def vacant(self) -> int | None:
        """A slot that nobody reads; None while all are read."""
        return next((slot for slot in range(self.slots) if slot not in self._lent), None)

    def lend(self, step: int, slot: int, size: int) -> NDArray[np.uint8]:
        """The logits of a step where they lie: [size] bytes of a slot, not vacant while anything refers to this array.

        Raises TransportError unless the slot holds just these.
        """
        if slot >= self.slots:
            raise TransportError(f"slot: {slot} is not one of {self.slots}")
        if size > self.slot_bytes:
            raise TransportError(f"slot: {size} bytes of logits do not fit a slot of {self.slot_bytes}")
        if self._map.size() != self._size:
            raise TransportError(f"slot: the file of the segment no longer has its {self._size} bytes")
        held, length = (int(number) for number in self._headers[slot])
        if held != step or length != size or held == 0:
            raise TransportError(
                f"slot {slot} holds {length} bytes of step {held}, expected {size} bytes of step {step}"
            )
        lent = self._payloads[slot, :size]
        self._lent.add(slot)
        weakref.finalize(lent, self._lent.discard, slot).atexit = False
        return lent


def row_memory(slot: int, width: int, dtype: torch.dtype, segment: SegmentWriter) -> RowMemory:
    """Where an expert may put the logit rows of a step, so that `put_logits` finds them in its slot."""

    def rows_memory(rows: int) -> torch.Tensor:
        size = rows * width * dtype.itemsize
        if not rows or size > segment.slot_bytes:
            return torch.empty(rows, width, dtype=dtype)
        return memory.on(segment.room(slot, size), (rows, width), dtype)

    return rows_memory


def put_logits(
    reply: expert_pb2.StepReply, logits: torch.Tensor, segment: SegmentWriter | None, slot: int | None
) -> None:
    """Add logits [rows, width] to a reply: to the slot that the step was given if that can hold them, else inline."""
    if not len(logits):
        return
    data = as_bytes(logits.contiguous())
    if segment is not None and slot is not None and len(data) <= segment.slot_bytes:
        segment.write(reply.number, slot, data)
        reply.slot = slot
    else:
        reply.inline = data.tobytes()


def take_logits(
    reply: expert_pb2.StepReply, rows: int, dtype: torch.dtype, segment: SegmentReader | None, slot: int | None
) -> torch.Tensor:
    """Logits [rows, reply.width] of a reply to a step that was given a slot; inverse of `put_logits`.

    They hold on to their slot. Raises TransportError if the reply does not hold exactly these.
    """
    size = rows * reply.width * dtype.itemsize
    held = reply.WhichOneof("logits")
    if (held is None) != (rows == 0):
        raise TransportError(f"logits: {held or 'none'}, but the reply has {rows} rows")
    if held == "slot" and (segment is None or reply.slot != slot):
        raise TransportError(f"slot: {reply.slot} was not asked for; it was {'none' if slot is None else slot}")
    if held == "inline" and len(reply.inline) != size:
        raise TransportError(f"inline: {len(reply.inline)} bytes, expected {size}")
    if size > MAX_MESSAGE_BYTES:
        raise TransportError(f"logits: {size} bytes are more than the {MAX_MESSAGE_BYTES} of a message")
    if segment is not None and held == "slot":
        return memory.on(segment.lend(reply.number, reply.slot, size), (rows, reply.width), dtype)
    logits = memory.empty((rows, reply.width), dtype)
    if held == "inline":
        as_bytes(logits)[:] = np.frombuffer(reply.inline, dtype=np.uint8)
    return logits
