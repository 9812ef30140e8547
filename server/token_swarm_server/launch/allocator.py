"""Keeps the memory of a process that runs for weeks at what it uses."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3
_LARGE = 2**20


def give_back_large_blocks() -> None:
    """Have the allocator map blocks of 1 MB and more one by one, and give them back once they are free.

    glibc raises that threshold to 32 MB when such blocks are freed; logits of a scored text then leave holes in its
    heap that stay resident and that nothing else uses, half as large as all that is in use. Elsewhere this does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
