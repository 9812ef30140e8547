"""From bytes to a stream of text: stop strings, complete code points, limits."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class StopMatcher:
    """Finds stop strings in a growing text and says how much of it may be shown.

    A suffix that may still become a stop string is held back; it is released as soon as it cannot.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self.matched: bytes | None = None

    def push(self, text: bytearray, new: int) -> int:
        """Look at `text`, of which the last `new` bytes are new; returns how many of its bytes may be shown.

        When a stop string is found, `matched` is set and the count is where the first one begins. Of two that
        begin together the longer is reported.
        """
        if not self._stops:
            return len(text)
        begin = max(0, len(text) - new - self._longest + 1)
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop, begin)) >= 0]
        if hits:
            first, _, self.matched = min(hits)
            return first
        return len(text) - self._held(text)

    def _held(self, text: bytearray) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = bytes(text[-length:])
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


class Utf8Stream:
    """Bytes in, complete code points out. Bytes that are no UTF-8 become U+FFFD; a code point is never split."""

    def __init__(self, data: bytes = b"") -> None:
        """As after `push(data)`."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(data)

    def push(self, data: bytes) -> str:
        """Text that is complete now."""
        return self._decoder.decode(data)

    def forget(self) -> None:
        """Drop the code point that has begun: its bytes are taken back."""
        self._decoder.reset()

    @property
    def incomplete(self) -> int:
        """Bytes of a code point that has begun and is not complete."""
        return len(self._decoder.getstate()[0])
