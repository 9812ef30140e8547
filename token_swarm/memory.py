"""Memory of large arrays, used again once an array is gone.

A law of 262,144 tokens is 3 MB. The allocator takes that from the operating system and gives it back for every law, and
a page that is touched for the first time costs as much as what is computed in it; several threads do so one at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LEAST_BYTES = 2**16
"""Smaller arrays are left to the allocator."""
MOST_BYTES = 2**23
"""So are larger ones: rows of long prompts and of scored texts, which are rare."""
KEPT_BYTES = 2**25
"""Blocks of one size that wait to be used again have at most so many bytes, or are two: as much as the laws of eight
texts, which are let go of in one step and made again in the next."""

_kept: dict[int, deque[npt.NDArray[np.uint8]]] = {}


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU. May be called from any thread."""
    size = math.prod(shape) * dtype.itemsize
    if not LEAST_BYTES <= size <= MOST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return on(_lend(size), shape, dtype)


def on(block: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in the memory of `block` [bytes]. It, and whatever is made of it, holds on to that very array."""
    known = _NUMPY.get(dtype)
    if known is None:
        return torch.frombuffer(block, dtype=dtype).view(shape)
    # Shaped by numpy: every operation of torch lets another thread have the interpreter. Of an array that it is given
    # numpy would keep the owner alone; of its buffer it keeps the array.
    return torch.from_numpy(np.frombuffer(block.data, known).reshape(shape))


def give_back_pages(block: Tensor) -> None:
    """Give the memory of a contiguous CPU tensor back to the operating system; what it held is lost.

    Its pages are mapped again when they are touched. Bytes before the first whole page and after the last stay. Where
    the system has no such call nothing happens.
    """
    first = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (block.data_ptr() + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0 and _madvise is not None:
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def trim() -> None:
    """Give back what the C allocator keeps of memory that is free, where it can be asked to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process that is in use, its libraries included; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _system_madvise() -> Callable[..., object] | None:
    # Elsewhere the advice has another meaning, or another number.
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else None


_madvise = _system_madvise()


def _lend(size: int) -> npt.NDArray[np.uint8]:
    """So many bytes. What is made of them must hold on to this array, as users of the buffer protocol do: the block is
    used again when it is gone."""
    # Few sizes, so that most blocks fit what comes next; what is beyond the array is never touched.
    capacity = 1 << (size - 1).bit_length()
    kept = _kept.get(capacity)
    if kept is None:
        kept = _kept.setdefault(capacity, deque(maxlen=max(2, KEPT_BYTES // capacity)))
    try:
        block = kept.pop()
    except IndexError:
        # Not from the allocator: what such blocks leave behind in its heap is held for ever and used by nobody.
        pages = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = np.frombuffer(pages, dtype=np.uint8)
    lent = block[:size]
    weakref.finalize(lent, kept.append, block).atexit = False
    return lent
