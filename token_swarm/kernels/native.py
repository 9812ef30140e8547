"""The kernels in C++ (kernels/csrc/), through ctypes, which releases the GIL during every call.

One thread each: experts keep the other cores busy. Tensors are on the CPU; outputs are allocated here, once a call.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from token_swarm import memory
from token_swarm.errors import BadParameter
from token_swarm.kernels import eager
from token_swarm.kernels.reference import STRIDE
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_EXPERTS = 64
"""What the C++ side holds on its stack."""

_I32, _I64, _F64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_PTR = ctypes.c_void_p


LEVELS = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}
"""Names of the instruction sets, the least first: as CAP_VARIABLE takes them, and as they are shown."""
CAP_VARIABLE = "TOKEN_SWARM_CPU_LEVEL"
"""Environment variable: the highest instruction set that the kernels may use. Read when they are first needed."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built.

    Raises BadParameter for a value of CAP_VARIABLE that is not allowed, RuntimeError for a library of other sources.
    """
    path = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")
    if not path.exists():
        return None
    loaded = ctypes.CDLL(str(path))
    try:
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, None
    except AttributeError as error:
        raise RuntimeError(f"{path}: built from other sources than these, install again: {error}") from None
    loaded.ts_level.argtypes, loaded.ts_level.restype = [], _I32
    loaded.ts_force_level(_allowed_level(loaded.ts_level()))
    return loaded


def cap() -> str | None:
    """What CAP_VARIABLE says, None where it is not set."""
    return os.environ.get(CAP_VARIABLE) or None


def _allowed_level(best: int) -> int:
    """The level to use on a processor whose best one is `best`."""
    asked = cap()
    if asked is None:
        return best
    names = list(LEVELS)
    possible = names[: best + 1]
    if asked not in possible:
        raise BadParameter(CAP_VARIABLE, asked, f"one of {', '.join(possible)} on this processor")
    return names.index(asked)


_SIGNATURES: dict[str, list[type]] = {
    "ts_force_level": [_I32],
    "ts_mix": [_I64, _I64, _I64, _PTR, _PTR, _PTR, _PTR, _PTR, _I32, _PTR, _PTR],
    "ts_mix_union": [
        _I64, _I64, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR, _I32, _F64,
        _PTR, _I64, _PTR, _I64, _PTR, _PTR, _I64, _PTR, _PTR,
    ],
    "ts_shape": [_I64, _I64, _PTR, _PTR, _PTR, _PTR, _PTR],
    "ts_choose": [_I64, _I64, _PTR, _PTR, _PTR, _PTR, _PTR],
    "ts_prefix_mass": [_I64, _I64, _I64, _I64, _PTR, _PTR, _PTR, _PTR],
    "ts_softmax_masses": [_I64, _I64, _I64, _PTR, _I32, _I64, _PTR, _PTR, _PTR, _PTR],
    "ts_linear": [_I64, _I64, _I64, _PTR, _PTR, _PTR, _PTR],
    "ts_pack_linear": [_I64, _I64, _PTR, _PTR, _PTR],
    "ts_rms_norm": [_I64, _I64, _PTR, _PTR, _F64, _PTR],
    "ts_score_linear": [_I64, _I64, _I64, _PTR, _I64, _PTR, _PTR, _PTR],
    "ts_score_log_linear": [_I64, _I64, _I64, _I64, _PTR, _PTR, _PTR, _PTR, _PTR],
}  # fmt: skip


def instruction_set(at_most: str | None = None) -> str:
    """The instruction set in use; `at_most` one of `baseline`, `AVX2` and `AVX-512` holds it down from now on.

    It never rises above CAP_VARIABLE.
    """
    loaded = require()
    shown = list(LEVELS.values())
    if at_most is not None:
        limits = [shown.index(at_most)] + [list(LEVELS).index(asked) for asked in [cap()] if asked]
        loaded.ts_force_level(min(limits))
    level: int = loaded.ts_level()
    return shown[level]


def require() -> ctypes.CDLL:
    """`library`, which has to be there. Raises RuntimeError."""
    loaded = library()
    if loaded is None:
        raise RuntimeError("the C++ kernels were not built: install with a C++ compiler at hand")
    return loaded


def _call(name: str, *arguments: object) -> None:
    getattr(require(), name)(*arguments)


def takes(*tensors: Tensor) -> bool:
    """Whether the C++ kernels can read these: on the CPU, and of a dtype that logits come in."""
    return all(tensor.device.type == "cpu" and tensor.dtype in _DTYPES for tensor in tensors)


class _Tables:
    """Logit tables as C arrays of addresses, dtypes and row strides; keeps the tensors alive."""

    def __init__(self, logits: Sequence[Tensor]) -> None:
        if len(logits) > MAX_EXPERTS:
            raise ValueError(f"experts: {len(logits)}, expected at most {MAX_EXPERTS} in one mixture")
        self._kept = [table if table.stride(-1) == 1 else table.contiguous() for table in logits]
        count = len(logits)
        self.rows = (_PTR * count)(*(table.data_ptr() for table in self._kept))
        self.dtypes = (_I32 * count)(*(_DTYPES[table.dtype] for table in self._kept))
        self.strides = (_I64 * count)(*(table.stride(0) for table in self._kept))


def _unsettled(table: Tensor) -> Tensor | None:
    """Rows of a result that are NaN, int64 [any]; None when there are none. They are bad, or such that float32 cannot
    hold them, which only the logits tell: those rows are done again in float64."""
    # In numpy: every operation of torch lets another thread have the interpreter.
    rows = np.flatnonzero(np.isnan(table.numpy()[:, 0]))
    return torch.from_numpy(rows) if rows.size else None


def mix(logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, allowed: Tensor) -> Tensor:
    """As `reference.mix`; float32 [rows, width]."""
    tables, own, heat = _Tables(logits), _doubles(weights), _doubles(temperatures)
    mask = allowed.contiguous()
    rows, experts = own.shape
    out = memory.empty((rows, mask.numel()), torch.float32)
    _call(
        "ts_mix", rows, mask.numel(), experts, tables.rows, tables.dtypes, tables.strides, own.data_ptr(),
        heat.data_ptr(), rule is Rule.LOG_LINEAR, mask.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if (again := _unsettled(out)) is not None:
        wide = [table[again].double() for table in logits]
        out[again] = eager.mix(wide, own[again], heat[again], rule, mask).float()
    return out


class _UnionTables:
    """A union map as C arrays, made once per map."""

    def __init__(self, union: UnionMap, widths: Sequence[int]) -> None:
        self.ids = union.ids.contiguous()
        self.twins = union.twins.contiguous()
        self.bounds = torch.tensor([(s.low, s.high) for s in union.segments], dtype=torch.int64)
        patterns = [sum(1 << expert for expert in segment.experts) for segment in union.segments]
        self.patterns = (ctypes.c_uint64 * len(patterns))(*patterns)
        self.allowed = []
        for expert, width in enumerate(widths):
            mask = torch.zeros(width, dtype=torch.bool)
            mask[union.pairs(expert)[1]] = True
            self.allowed.append(mask)
        self.masks = (_PTR * len(widths))(*(mask.data_ptr() for mask in self.allowed))
        self.widths = (_I64 * len(widths))(*widths)


_union_tables: dict[int, _UnionTables] = {}


def _tables_of(union: UnionMap, widths: Sequence[int]) -> _UnionTables:
    key = id(union)
    if key not in _union_tables:
        _union_tables[key] = _UnionTables(union, widths)
        weakref.finalize(union, _union_tables.pop, key, None)
    return _union_tables[key]


def mix_union(
    logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, union: UnionMap, floor: float
) -> Tensor:
    """As `reference.mix_union`; float32 [rows, union.size]."""
    tables, own, heat = _Tables(logits), _doubles(weights), _doubles(temperatures)
    known = _tables_of(union, [table.shape[-1] for table in logits])
    rows, experts = own.shape
    out = memory.empty((rows, union.size), torch.float32)
    _call(
        "ts_mix_union", rows, experts, tables.rows, tables.dtypes, tables.strides, known.widths, own.data_ptr(),
        heat.data_ptr(), rule is Rule.LOG_LINEAR, floor, known.masks, union.size, known.ids.data_ptr(),
        len(union.segments), known.bounds.data_ptr(), known.patterns, known.twins.shape[0], known.twins.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    if (again := _unsettled(out)) is not None:
        out[again] = eager.mix_union([table[again] for table in logits], own[again], heat[again], rule, union, floor)
    return out


def shape(probabilities: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `reference.shape`; float32 [rows, width]."""
    return shape_(probabilities.clone(memory_format=torch.contiguous_format), temperature, top_k, top_p, min_p)


def shape_(probabilities: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`shape` in place, on contiguous rows."""
    heat, nucleus, least = _doubles(temperature), _doubles(top_p), _doubles(min_p)
    count = top_k.to(torch.int64).contiguous()
    _call(
        "ts_shape", *probabilities.shape, probabilities.data_ptr(), heat.data_ptr(), count.data_ptr(),
        nucleus.data_ptr(), least.data_ptr(),
    )  # fmt: skip
    return probabilities


def choose(probabilities: Tensor, uniforms: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.choose`."""
    rows, width = probabilities.shape
    table, own, flags = probabilities.contiguous(), _doubles(uniforms), greedy.to(torch.bool).contiguous()
    tokens = torch.empty(rows, dtype=torch.int64)
    log_probs = torch.empty(rows, dtype=torch.float64)
    _call(
        "ts_choose", rows, width, table.data_ptr(), own.data_ptr(), flags.data_ptr(), tokens.data_ptr(),
        log_probs.data_ptr(),
    )  # fmt: skip
    return tokens, log_probs


def prefix_mass(probabilities: Tensor, order: Tensor | int, every: int = 1) -> tuple[Tensor, Tensor]:
    """As `reference.prefix_mass`."""
    rows, width = probabilities.shape
    table, ids, count = probabilities.contiguous(), *_order(order)
    ordered = memory.empty((rows, count), torch.float32)
    cumulative = memory.empty((rows, count // every + 1), torch.float64)
    _call(
        "ts_prefix_mass", rows, width, count, every, table.data_ptr(), _address(ids),
        ordered.data_ptr(), cumulative.data_ptr(),
    )  # fmt: skip
    return ordered, cumulative


def softmax_masses(logits: Tensor, temperatures: Tensor, order: Tensor | int, tokens: int) -> tuple[Tensor, Tensor]:
    """As `reference.softmax_masses`; float32 probabilities."""
    table = logits if logits.stride(-1) == 1 else logits.contiguous()
    heat, ids, count = _as(torch.float64, temperatures), *_order(order)
    rows = table.shape[0]
    ordered = memory.empty((rows, count), torch.float32)
    sums = memory.empty((rows, tokens // STRIDE + 1), torch.float64)
    _call(
        "ts_softmax_masses", rows, count, tokens, table.data_ptr(), _DTYPES[table.dtype], table.stride(0),
        heat.data_ptr(), _address(ids), ordered.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    if (again := _unsettled(ordered)) is not None:
        wide, exact = eager.softmax_masses(table[again].double(), heat[again], order, tokens)
        ordered[again], sums[again] = wide.float(), exact
    return ordered, sums


def score_linear(masses: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `reference.score_linear`."""
    table, own, bounds = masses.contiguous(), _doubles(weights), offsets.contiguous()
    experts, positions = table.shape
    items = offsets.numel() - 1
    out = torch.empty((own.shape[0], items), dtype=torch.float64)
    _call(
        "ts_score_linear", experts, own.shape[0], items, table.data_ptr(), positions, own.data_ptr(),
        bounds.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def score_log_linear(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """As `reference.score_log_linear`."""
    table, own, bounds = log_probs.contiguous(), _doubles(weights), offsets.contiguous()
    there = targets.contiguous()
    _, experts, symbols = table.shape
    items = offsets.numel() - 1
    out = torch.empty((own.shape[0], items), dtype=torch.float64)
    _call(
        "ts_score_log_linear", experts, symbols, own.shape[0], items, table.data_ptr(),
        there.data_ptr(), own.data_ptr(), bounds.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def pack_linear(inputs: int, outputs: int, weight: Tensor, order: Tensor | None, pairs: Tensor) -> None:
    """The pairs of `linear.Bfloat16Linear`, into `pairs`; nothing is checked."""
    places = None if order is None else order.data_ptr()
    _call("ts_pack_linear", inputs, outputs, weight.data_ptr(), places, pairs.data_ptr())


def linear(rows: int, inner: int, outputs: int, pairs: Tensor, bias: Tensor, inputs: Tensor, out: Tensor) -> None:
    """The product of `linear.Bfloat16Linear`, into `out`; nothing is checked."""
    _call(
        "ts_linear", rows, inner, outputs, pairs.data_ptr(), bias.data_ptr(), inputs.data_ptr(), out.data_ptr()
    )  # fmt: skip


def rms_norm(hidden: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """As `F.rms_norm` over the last dimension of float32 `hidden`, `gain` its weight."""
    table, width = hidden.contiguous(), gain.numel()
    out = torch.empty(table.shape)
    rows = table.numel() // width
    _call("ts_rms_norm", rows, width, table.data_ptr(), gain.data_ptr(), epsilon, out.data_ptr())
    return out


def _order(order: Tensor | int) -> tuple[Tensor | None, int]:
    """Ids as the kernels take them, None for the first so many, and their number."""
    return (None, order) if isinstance(order, int) else (_as(torch.int32, order), order.numel())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _doubles(tensor: Tensor) -> Tensor:
    return _as(torch.float64, tensor)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # Nothing is called on what is right already: every operation of torch lets another thread have the interpreter.
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
