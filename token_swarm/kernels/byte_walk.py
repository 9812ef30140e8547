"""The byte walk in C++ (csrc/walk.cpp): groups of heads that move many bytes a call, without Python in between.

Plain arrays go in and out; what they mean is said in `mixing.byte_group`, whose Python version this must equal.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from token_swarm.kernels import native

_I32, _I64, _F64, _PTR = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SYMBOLS = 257


class LawView(ctypes.Structure):
    """One next-token law: see `law_view`."""

    _fields_ = (("probabilities", _PTR), ("sums", _PTR), ("end", _F64), ("wide", _I32))


class _GroupSpec(ctypes.Structure):
    _fields_ = (
        ("order", _PTR), ("low", _PTR), ("high", _PTR), ("longer", _PTR), ("first_child", _PTR), ("byte", _PTR),
        ("tokens", _I64), ("epsilon", _F64), ("window", _I64), ("max_heads", _I64), ("split_discount", _F64),
        ("boundary_floor", _F64), ("negligible", _F64), ("exact_below", _F64), ("weight", _F64), ("members", _I64),
        ("exponents", _PTR), ("history_tokens", _I64), ("prompt_tokens", _I64), ("tail", ctypes.c_char_p),
        ("tail_length", _I64),
    )  # fmt: skip


class HeadView(ctypes.Structure):
    """A head as it stands. key names it for `feed`; length: tokens of its history; law: slot, -1 while cold."""

    _fields_ = (
        ("key", _I64), ("start", _I64), ("length", _I64), ("weight", _F64), ("history", _I32), ("law", _I32),
        ("node", _I32), ("group", _I32),
    )  # fmt: skip


class GroupView(ctypes.Structure):
    """A group as it stands; best_*: its heaviest head."""

    _fields_ = (
        ("certificate", _F64), ("retired", _F64), ("heads", _I64), ("best_length", _I64), ("best_history", _I32),
        ("lost", _I32),
    )  # fmt: skip


class _WalkView(ctypes.Structure):
    _fields_ = (
        ("uniforms", _PTR), ("uniform_count", _I64), ("script", ctypes.c_char_p), ("max_bytes", _I64),
        ("max_tokens", _I64), ("bytes", _PTR), ("log_probs", _PTR), ("shares", _PTR), ("count", _I64),
        ("symbols", _I64), ("certificate", _F64), ("status", _I32), ("symbol", _I32),
    )  # fmt: skip


class Status(enum.IntEnum):
    """Why a walk stopped."""

    NEEDS_FORWARD = 0
    ENDED = 1
    NOTHING_FOLLOWS = 2
    LIMIT = 3
    NEEDS_UNSHAPED = 4
    """A symbol was chosen that a group's shaped law excludes: give it the unshaped laws and walk on."""


# Looking a member up by its value takes longer than a byte.
_STATUSES = tuple(Status)


class Which(enum.IntEnum):
    """Which heads `ByteWalk.heads` lists."""

    ALL = 0
    COLD = 1


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ts_sequence_new": (_PTR, [_I64, _PTR, _I32]),
    "ts_sequence_free": (None, [_PTR]),
    "ts_heads": (_I64, [_PTR, _I64, _I32, _PTR, _I64]),
    "ts_due": (_I64, [_PTR, _PTR, _I64]),
    "ts_history": (_I64, [_PTR, _I64, _I32, _PTR, _I64]),
    "ts_put_law": (None, [_PTR, _I64, _I32, _PTR, _I64, _PTR]),
    "ts_feed": (None, [_PTR, _I64, _I64, _I32]),
    "ts_used_laws": (_I64, [_PTR, _I64, _PTR, _I64]),
    "ts_group_law": (None, [_PTR, _I64, _PTR]),
    "ts_member_masses": (None, [_PTR, _I64, _I32, _PTR]),
    "ts_reaches": (_I32, [_PTR, _I64, _I32]),
    "ts_advance": (None, [_PTR, _I64, _I32]),
    "ts_group_view": (None, [_PTR, _I64, _PTR]),
    "ts_walk": (None, [_I64, _PTR, _PTR]),
}


_LONG = ("ts_walk", "ts_group_law", "ts_advance")
"""Calls that let other threads run. The others take a microsecond or two: less than to get the interpreter back."""


@cache
def _library() -> Any:
    loaded = native.library()
    if loaded is None:
        raise RuntimeError("the C++ kernels were not built")
    quick = ctypes.PyDLL(loaded._name, handle=loaded._handle)
    functions = SimpleNamespace()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded if name in _LONG else quick, name)
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


@dataclass(frozen=True)
class WalkGroup:
    """One group: the arrays of its trie (see `mixing.trie.ByteTrie`) and the constants of `mixing.byte_group`.

    weight: across groups; exponents: of its members. history_tokens: of the first head; prompt_tokens: of the prompt.
    tail: bytes of the prompt that are pending. window None: nothing is given up.
    """

    order: npt.NDArray[np.int64]
    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    longer: npt.NDArray[np.int32]
    first_child: npt.NDArray[np.int32]
    byte: npt.NDArray[np.uint8]
    epsilon: float
    window: int | None
    max_heads: int
    split_discount: float
    boundary_floor: float
    negligible: float
    exact_below: float
    weight: float
    exponents: tuple[float, ...]
    history_tokens: int
    prompt_tokens: int
    tail: bytes


@dataclass
class Stretch:
    """What one walk did. shares: summed over symbols, [experts]; certificate: the largest on the way.

    symbol: the last one chosen; with NEEDS_UNSHAPED it is not appended yet.
    """

    data: bytes
    log_probs: list[float]
    shares: list[float]
    certificate: float
    status: Status
    symbol: int


def law_view(probabilities: npt.NDArray[Any], sums: npt.NDArray[np.float64], end: float) -> LawView:
    """A law by address: the arrays must outlive its use. probabilities: float32 or float64 [tokens], byte-sorted; sums:
    [tokens // STRIDE + 1], see `reference.prefix_mass`."""
    return LawView(_address(probabilities), _address(sums), end, int(probabilities.dtype == np.float64))


def _address(array: npt.NDArray[Any]) -> int:
    # `array.ctypes` makes an object first, which costs ten times as much.
    address: int = array.__array_interface__["data"][0]
    return address


class _Listing:
    """What a call writes into an array that is kept for the next one: to make it would take longer than the call."""

    def __init__(self, kind: Any, room: int, function: Any) -> None:
        """function(*arguments, array, its length): returns how much there is, which may be more than that."""
        self._kind = kind
        self._room = room
        self._function = function
        self._out = (kind * room)()

    def __call__(self, *arguments: object) -> list[Any]:
        """Until the next call: structures in it are written over."""
        count = self._function(*arguments, self._out, self._room)
        if count > self._room:
            self._room = count
            self._out = (self._kind * count)()
            self._function(*arguments, self._out, count)
        listed: list[Any] = self._out[:count]
        return listed


class ByteWalk:
    """One text: several groups of heads in C++. Not for several threads at once."""

    def __init__(self, groups: Sequence[WalkGroup], *, log_linear: bool) -> None:
        self._library = library = _library()
        self._groups = list(groups)  # keeps the tries' arrays alive
        self._exponents = [np.asarray(group.exponents, dtype=np.float64) for group in groups]
        specs = (_GroupSpec * len(groups))(
            *(self._spec(group, own) for group, own in zip(groups, self._exponents, strict=True))
        )
        self.experts = sum(len(group.exponents) for group in groups)
        self.handle = self._library.ts_sequence_new(len(groups), specs, log_linear)
        self._view = _WalkView()
        self.view_address = ctypes.addressof(self._view)
        self._shares = (_F64 * self.experts)()
        self._view.shares = ctypes.addressof(self._shares)
        self._room = 0
        self._heads = _Listing(HeadView, 16, library.ts_heads)
        self._due = _Listing(HeadView, 16, library.ts_due)
        self._history = _Listing(_I32, 256, library.ts_history)
        self._used_laws = _Listing(_I32, 32, library.ts_used_laws)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.ts_sequence_free(self.handle)

    @staticmethod
    def _spec(group: WalkGroup, exponents: npt.NDArray[np.float64]) -> _GroupSpec:
        return _GroupSpec(
            group.order.ctypes.data, group.low.ctypes.data, group.high.ctypes.data, group.longer.ctypes.data,
            group.first_child.ctypes.data, group.byte.ctypes.data, group.order.size, group.epsilon,
            -1 if group.window is None else group.window, group.max_heads, group.split_discount, group.boundary_floor,
            group.negligible, group.exact_below, group.weight, exponents.size, exponents.ctypes.data,
            group.history_tokens, group.prompt_tokens, group.tail, len(group.tail),
        )  # fmt: skip

    def heads(self, group: int, which: Which) -> list[HeadView]:
        """Heads of a group as they are now, until the next call; the cold ones heaviest first."""
        return self._heads(self.handle, group, which)

    def due(self) -> list[HeadView]:
        """Cold heads of every group that its law cannot do without, heaviest first; until the next call."""
        return self._due(self.handle)

    def history(self, group: int, history: int) -> tuple[int, ...]:
        """The tokens of a head's history beyond the group's first one."""
        return tuple(self._history(self.handle, group, history))

    def put_law(self, group: int, slot: int, own: LawView, members: Sequence[LawView]) -> None:
        """Put a law, and its members', into a slot of the caller's choice."""
        table = (LawView * len(members))(*members)
        self._library.ts_put_law(self.handle, group, slot, ctypes.byref(own), len(members), table)

    def feed(self, group: int, key: int, slot: int) -> list[int]:
        """Give the law in a slot to a cold head; returns the slots that heads have laws in after that."""
        self._library.ts_feed(self.handle, group, key, slot)
        return self._used_laws(self.handle, group)

    def law(self, group: int) -> npt.NDArray[np.float64]:
        """A group's next-symbol law: [257]."""
        law = np.empty(_SYMBOLS)
        self._library.ts_group_law(self.handle, group, law.ctypes.data)
        return law

    def member_masses(self, group: int, symbol: int) -> npt.NDArray[np.float64]:
        """How much of a symbol's probability each member of a group gave, unnormalised: [members]."""
        masses = np.empty(len(self._groups[group].exponents))
        self._library.ts_member_masses(self.handle, group, symbol, masses.ctypes.data)
        return masses

    def reaches(self, group: int, byte: int) -> bool:
        """Whether a group gives a byte any probability."""
        return bool(self._library.ts_reaches(self.handle, group, byte))

    def advance(self, group: int, byte: int) -> None:
        """Move one group one byte on."""
        self._library.ts_advance(self.handle, group, byte)

    def view(self, group: int) -> GroupView:
        """How a group stands."""
        view = GroupView()
        self._library.ts_group_view(self.handle, group, ctypes.byref(view))
        return view

    def walk(
        self, *, uniforms: npt.NDArray[np.float64] | None, script: bytes | None, max_bytes: int, max_tokens: int
    ) -> Stretch:
        """Choose and append bytes until a forward is needed; see `walk_together`."""
        return walk_together(
            [self], uniforms=[uniforms], scripts=[script], max_bytes=[max_bytes], max_tokens=[max_tokens]
        )[0]

    def _prepare(
        self, uniforms: npt.NDArray[np.float64] | None, script: bytes | None, max_bytes: int, max_tokens: int
    ) -> None:
        view = self._view
        if max_bytes > self._room:
            # Kept from walk to walk: a walk is a few bytes long, and making arrays would cost more than it does. Of
            # these a slice is a Python object at once, without an array in between.
            self._room = max_bytes
            self._bytes = (ctypes.c_char * max_bytes)()
            self._log_probs = (_F64 * (max_bytes + 1))()
            view.bytes, view.log_probs = ctypes.addressof(self._bytes), ctypes.addressof(self._log_probs)
        if uniforms is None:
            view.uniforms = None
        else:
            view.uniforms, view.uniform_count = _address(uniforms), uniforms.size
        view.script, view.max_bytes, view.max_tokens = script, max_bytes, max_tokens

    def _stretch(self) -> Stretch:
        view = self._view
        return Stretch(
            self._bytes[: view.count],  # type: ignore[arg-type]  # a slice of c_char is bytes, unknown to the stubs
            self._log_probs[: view.symbols],
            self._shares[:],
            view.certificate,
            _STATUSES[view.status],
            view.symbol,
        )


def walk_together(
    walks: Sequence[ByteWalk],
    *,
    uniforms: Sequence[npt.NDArray[np.float64] | None],
    scripts: Sequence[bytes | None],
    max_bytes: Sequence[int],
    max_tokens: Sequence[int],
) -> list[Stretch]:
    """Walk several texts in one call, each until it needs a forward, ends, or reaches a limit.

    Per text: uniforms, one a symbol, None for greedy; a script of at least max_bytes bytes to follow instead, or None;
    max_bytes: of this walk; max_tokens: of the group that needs fewest, counted from the prompt, 0 for no limit.
    """
    for walk, own, script, most, tokens in zip(walks, uniforms, scripts, max_bytes, max_tokens, strict=True):
        walk._prepare(own, script, most, tokens)
    handles = (_PTR * len(walks))(*[walk.handle for walk in walks])
    views = (_PTR * len(walks))(*[walk.view_address for walk in walks])
    _library().ts_walk(len(walks), handles, views)
    return [walk._stretch() for walk in walks]
