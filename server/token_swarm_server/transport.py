"""How logits travel between an expert's process and the coordinator: a mapped file, or inside the message.

The file lies in a memory-backed directory under an unpredictable name, is private to the user, and loses its
name as soon as both ends have mapped it, so that a crash leaves nothing behind. Its slots are used in turn.
A slot starts with the number of the step it holds, which the writer clears first and sets last and the reader
checks before and after copying: a slot that is stale or half written is an error, never wrong logits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import stat
from pathlib import Path

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from token_swarm import memory
from token_swarm.experts.contract import RowMemory
from token_swarm.v1 import expert_pb2
from token_swarm_server.errors import TransportError

# What reading a finished grpc.aio stream returns; the stubs do not know it.
END_OF_STREAM = grpc.aio.EOF  # type: ignore[attr-defined]
MAX_MESSAGE_BYTES = 256 * 2**20
# Two slots: what the reader got last stays whole while the writer fills the other.
SLOTS = 2
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

    def __init__(self, descriptor: int, slots: int, slot_bytes: int, *, writable: bool) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        stride = self.stride(slot_bytes)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(descriptor, slots * stride, access=access)
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
        # Rows that a failed step left behind in its traceback keep the memory mapped for as long as they live.
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
            super().__init__(descriptor, SLOTS, slot_bytes, writable=True)
        except BaseException:
            self.unlink()
            raise
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        """Take the name away; what is mapped stays mapped."""
        self._path.unlink(missing_ok=True)

    def room(self, step: int, size: int) -> NDArray[np.uint8]:
        """So many bytes of a step's slot, to put its logits there at once. What the slot held is void from here on."""
        slot = step % self.slots
        self._headers[slot][0] = 0
        return self._payloads[slot, :size]

    def write(self, step: int, data: NDArray[np.uint8]) -> int:
        """Put the logits of a step (at least 1) into its slot, unless they are there; returns the slot's number."""
        slot = step % self.slots
        header = self._headers[slot]
        header[0] = 0
        payload = self._payloads[slot, : len(data)]
        if payload.ctypes.data != data.ctypes.data:
            payload[:] = data
        header[1] = len(data)
        header[0] = step
        return slot


class SegmentReader(_Segment):
    """The coordinator's end.

    An expert that takes memory away from its file before it answers is found out; one that does so in the very moment
    of the copy would end this process with SIGBUS. Whoever can do that runs as the same user: an expert that is not
    trusted so far belongs on TCP, where logits travel inside messages.
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
            directory / offer.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != self._size:
                raise TransportError(f"offer: {offer.name} is not a file of {self._size} bytes")
            super().__init__(descriptor, offer.slots, offer.slot_bytes, writable=False)
        finally:
            os.close(descriptor)

    def read(self, step: int, slot: int, out: NDArray[np.uint8]) -> None:
        """Copy the logits of a step to `out`. Raises TransportError unless the slot holds just these."""
        if slot >= self.slots:
            raise TransportError(f"slot: {slot} is not one of {self.slots}")
        if len(out) > self.slot_bytes:
            raise TransportError(f"slot: {len(out)} bytes of logits do not fit a slot of {self.slot_bytes}")
        if self._map.size() != self._size:
            raise TransportError(f"slot: the file of the segment no longer has its {self._size} bytes")
        header = self._headers[slot]
        self._check(header, step, slot, len(out))
        out[:] = self._payloads[slot, : len(out)]
        self._check(header, step, slot, len(out))

    @staticmethod
    def _check(header: NDArray[np.uint64], step: int, slot: int, size: int) -> None:
        held, length = int(header[0]), int(header[1])
        if held != step or length != size or held == 0:
            raise TransportError(
                f"slot {slot} holds {length} bytes of step {held}, expected {size} bytes of step {step}"
            )


def row_memory(step: int, width: int, dtype: torch.dtype, segment: SegmentWriter) -> RowMemory:
    """Where an expert may put the logit rows of a step, so that `put_logits` finds them in their slot."""

    def rows_memory(rows: int) -> torch.Tensor:
        size = rows * width * dtype.itemsize
        if not rows or size > segment.slot_bytes:
            return torch.empty(rows, width, dtype=dtype)
        return torch.from_numpy(segment.room(step, size)).view(dtype).view(rows, width)

    return rows_memory


def put_logits(reply: expert_pb2.StepReply, logits: torch.Tensor, segment: SegmentWriter | None) -> None:
    """Add logits [rows, width] to a reply: to a slot where one can hold them, else inline."""
    if not len(logits):
        return
    data = as_bytes(logits.contiguous())
    if segment is not None and len(data) <= segment.slot_bytes:
        reply.slot = segment.write(reply.number, data)
    else:
        reply.inline = data.tobytes()


def take_logits(
    reply: expert_pb2.StepReply, rows: int, dtype: torch.dtype, segment: SegmentReader | None
) -> torch.Tensor:
    """Logits [rows, reply.width] of a reply, in memory of their own; inverse of `put_logits`.

    Raises TransportError if the reply does not hold exactly these.
    """
    size = rows * reply.width * dtype.itemsize
    held = reply.WhichOneof("logits")
    if (held is None) != (rows == 0):
        raise TransportError(f"logits: {held or 'none'}, but the reply has {rows} rows")
    if held == "slot" and segment is None:
        raise TransportError("slot: the stream has no shared memory")
    if held == "inline" and len(reply.inline) != size:
        raise TransportError(f"inline: {len(reply.inline)} bytes, expected {size}")
    if size > MAX_MESSAGE_BYTES:
        raise TransportError(f"logits: {size} bytes are more than the {MAX_MESSAGE_BYTES} of a message")
    logits = memory.empty((rows, reply.width), dtype)
    if held == "inline":
        as_bytes(logits)[:] = np.frombuffer(reply.inline, dtype=np.uint8)
    elif segment is not None and rows:
        segment.read(reply.number, reply.slot, as_bytes(logits))
    return logits
