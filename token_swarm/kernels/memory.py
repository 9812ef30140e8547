"""Memory of large arrays, used again once an array is gone.

A law of 262,144 tokens is 3 MB. The allocator takes that from the operating system and gives it back for every law, and
a page that is touched for the first time costs as much as what is computed in it; several threads do so one at a time.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LEAST_BYTES = 2**16
"""Smaller arrays are left to the allocator."""
KEPT_BYTES = 2**24
"""Blocks of one size that wait to be used again have at most so many bytes, or are two."""
_LINE = 64

_kept: dict[int, deque[npt.NDArray[np.uint8]]] = {}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU. May be called from any thread."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    kept = _kept.get(size)
    if kept is None:
        kept = _kept.setdefault(size, deque(maxlen=max(2, KEPT_BYTES // size)))
    try:
        block = kept.pop()
    except IndexError:
        # On a cache line, as torch has it.
        raw = np.empty(size + _LINE, dtype=np.uint8)
        start = -raw.ctypes.data % _LINE
        block = raw[start : start + size]
    # The tensor, and every view of it, holds on to this array and to nothing else of the block.
    lent = block[:]
    weakref.finalize(lent, kept.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)
