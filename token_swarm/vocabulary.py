"""An expert's vocabulary: which bytes each token id writes, and which ids end the text."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

_MAGIC = b"TSV1"


@dataclass(frozen=True)
class Vocabulary:
    """Token id -> bytes, and the ids that end a text.

    `token_bytes[id]` is None for an id that writes nothing: special tokens, end-of-text tokens and padded logit
    rows. Ids without bytes that do not end the text are masked wherever a distribution is formed.
    Several ids may write the same bytes. The table is as long as a logit row is wide.
    """

    token_bytes: tuple[bytes | None, ...]
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse a table that no decoder could use."""
        object.__setattr__(self, "eos_ids", tuple(sorted(set(self.eos_ids))))
        for eos in self.eos_ids:
            if not 0 <= eos < len(self.token_bytes):
                raise ValueError(f"eos_ids: {eos} is outside the vocabulary of {len(self.token_bytes)} ids")
            if self.token_bytes[eos] is not None:
                raise ValueError(f"eos_ids: token {eos} ends the text and so must not write bytes")
        if any(entry == b"" for entry in self.token_bytes):
            raise ValueError("token_bytes: a token that writes nothing must be None, not b''")
        if all(entry is None for entry in self.token_bytes):
            raise ValueError("token_bytes: no token of this vocabulary writes any bytes")

    @property
    def width(self) -> int:
        """Number of ids, equal to the width of a logit row."""
        return len(self.token_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the whole table and the end-of-text ids."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def allowed(self) -> np.ndarray:
        """bool [width]: ids that may be generated, that is those with bytes and those that end the text."""
        mask = np.fromiter((entry is not None for entry in self.token_bytes), dtype=bool, count=self.width)
        mask[list(self.eos_ids)] = True
        mask.setflags(write=False)
        return mask

    def in_byte_order(self) -> tuple[Vocabulary, npt.NDArray[np.int64]]:
        """The same tokens numbered in the order of their bytes, and by new id the id that it has here: [width].

        Ids that end a text follow, then all others; equals keep their order.
        """
        ends = frozenset(self.eos_ids)

        def place(old: int) -> tuple[int, bytes]:
            entry = self.token_bytes[old]
            return (0, entry) if entry is not None else (1 if old in ends else 2, b"")

        old_ids = sorted(range(self.width), key=place)
        table = tuple(self.token_bytes[old] for old in old_ids)
        new_ends = tuple(new for new, old in enumerate(old_ids) if old in ends)
        return Vocabulary(table, new_ends), np.asarray(old_ids, dtype=np.int64)

    def text(self, tokens: Sequence[int]) -> bytes:
        """Bytes written by `tokens`; ids without bytes write nothing."""
        return b"".join(self.token_bytes[token] or b"" for token in tokens)

    def to_bytes(self) -> bytes:
        """Serialise deterministically: header, lengths (int32, -1 for None), end-of-text ids, bytes."""
        lengths = np.fromiter(
            (-1 if entry is None else len(entry) for entry in self.token_bytes), dtype="<i4", count=self.width
        )
        blob = b"".join(entry for entry in self.token_bytes if entry)
        head = struct.pack("<4sIIQ", _MAGIC, self.width, len(self.eos_ids), len(blob))
        return head + lengths.tobytes() + np.asarray(self.eos_ids, dtype="<i4").tobytes() + blob

    @classmethod
    def from_bytes(cls, data: bytes) -> Vocabulary:
        """Inverse of `to_bytes`. Raises ValueError when `data` is not a whole vocabulary."""
        header = struct.calcsize("<4sIIQ")
        if len(data) < header:
            raise ValueError(f"vocabulary data of {len(data)} bytes is shorter than its {header}-byte header")
        magic, width, n_eos, n_blob = struct.unpack_from("<4sIIQ", data)
        expected = header + 4 * width + 4 * n_eos + n_blob
        if magic != _MAGIC or len(data) != expected:
            raise ValueError(
                f"not a vocabulary: {len(data)} bytes with tag {magic!r}, expected {expected} with {_MAGIC!r}"
            )
        lengths = np.frombuffer(data, dtype="<i4", count=width, offset=header)
        eos = np.frombuffer(data, dtype="<i4", count=n_eos, offset=header + 4 * width)
        if int(lengths.clip(min=0).sum()) != n_blob or bool((lengths < -1).any()):
            raise ValueError("not a vocabulary: token lengths do not add up to the bytes that follow")
        blob = memoryview(data)[header + 4 * width + 4 * n_eos :]
        ends = np.cumsum(lengths.clip(min=0))
        table = tuple(
            None if length < 0 else bytes(blob[end - length : end])
            for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)
        )
        return cls(table, tuple(eos.tolist()))
