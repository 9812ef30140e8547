"""Reading a GGUF file: its metadata and, a piece at a time, its tensors as float32.

`gguf.GGUFReader` makes numpy arrays of every string of a vocabulary, which takes 12 s of processor time for Qwen2.5's
151,936 tokens and their merges; this reader takes a quarter of a second. The values are dequantised by `gguf`.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's format of each type of number."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. `shape`: as torch has it, the last dimension contiguous; `offset`: bytes from the start."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(self.size // block_size * block_bytes)


class GgufFile:
    """A GGUF file of version 2 or 3. Raises ValueError for another file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._data[:4] != _MAGIC:
            raise ValueError(f"{path.name}: not a GGUF file")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"{path.name}: GGUF version {version}; supported: 2 and 3")
        tensors, fields = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {self._string(): self._value(self._number("I")) for _ in range(fields)}
        self.tensors = self._tensor_table(tensors)

    def read(self, name: str, most: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """The values of a tensor, at once or in pieces of whole rows with about `most` values each."""
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        row_bytes = tensor.stored_bytes // (tensor.size // width)
        stored = np.frombuffer(self._data, np.uint8, tensor.stored_bytes, tensor.offset).reshape(-1, row_bytes)
        step = max(1, most // width) if most else len(stored)
        for start in range(0, len(stored), step):
            values: npt.NDArray[np.float32] = dequantize(stored[start : start + step], tensor.kind)
            yield values.reshape(-1, *tensor.shape[1:])

    def _tensor_table(self, count: int) -> dict[str, Tensor]:
        table = []
        for _ in range(count):
            name, dimensions = self._string(), self._number("I")
            # GGUF begins with the contiguous dimension.
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            table.append((name, shape, GGMLQuantizationType(self._number("I")), self._number("Q")))
        alignment: int = self.metadata.get("general.alignment", _ALIGNMENT)
        start = math.ceil(self._at / alignment) * alignment
        return {name: Tensor(shape, kind, start + offset) for name, shape, kind, offset in table}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._number("I"), self._number("Q")
            if kind in _NUMBERS:
                return list(self._numbers(_NUMBERS[kind], count))
            return [self._value(kind) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"GGUF metadata: unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _number(self, form: str) -> Any:
        return self._numbers(form, 1)[0]

    def _numbers(self, form: str, count: int) -> tuple[Any, ...]:
        numbers = struct.unpack_from(f"<{count}{form}", self._data, self._at)
        self._at += struct.calcsize(form) * count
        return numbers

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        start = self._at + 8
        self._at = start + length
        return self._data[start : self._at].decode("utf-8")
