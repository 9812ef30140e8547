"""One function each way between the expert contract's dataclasses and the messages of ExpertService.

Everything that comes from the other process is checked here: TransportError, never a surprise later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from token_swarm.errors import BadParameter
from token_swarm.experts.contract import (
    Close,
    ExpertSpec,
    Extend,
    Fork,
    Op,
    Open,
    OpError,
    OpErrorKind,
    Rows,
    StepResult,
    Truncate,
)
from token_swarm.experts.ops import row_count
from token_swarm.v1 import expert_pb2
from token_swarm.vocabulary import Vocabulary
from token_swarm_server.rpc.errors import TransportError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROWS_TO_PROTO = {
    Rows.NONE: expert_pb2.ROWS_NONE,
    Rows.LAST: expert_pb2.ROWS_LAST,
    Rows.ALL: expert_pb2.ROWS_ALL,
}
_ROWS_FROM_PROTO = {value: rows for rows, value in _ROWS_TO_PROTO.items()}
_KIND_TO_PROTO = {
    OpErrorKind.UNKNOWN_SEQUENCE: expert_pb2.OP_ERROR_KIND_UNKNOWN_SEQUENCE,
    OpErrorKind.SEQUENCE_EXISTS: expert_pb2.OP_ERROR_KIND_SEQUENCE_EXISTS,
    OpErrorKind.CONTEXT_FULL: expert_pb2.OP_ERROR_KIND_CONTEXT_FULL,
    OpErrorKind.NO_FREE_SEQUENCE: expert_pb2.OP_ERROR_KIND_NO_FREE_SEQUENCE,
    OpErrorKind.INVALID: expert_pb2.OP_ERROR_KIND_INVALID,
}
_KIND_FROM_PROTO = {value: kind for kind, value in _KIND_TO_PROTO.items()}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TimedStepResult(StepResult):
    """A step's result, the seconds the expert computed, how many sequences shared the forward, and whether the logits
    travelled inside the message."""

    seconds: float
    batch_size: int
    inline: bool


def check_ops(ops: Sequence[Op], max_rows: int) -> int:
    """Logit rows that `ops` ask for.

    Raises BadParameter for more than `max_rows`, an id beyond 64 bits, and a token or length beyond 32.
    """
    for index, op in enumerate(ops):
        ids = (op.sequence, op.new) if isinstance(op, Fork) else (op.sequence,)
        numbers = op.tokens if isinstance(op, Open | Extend) else ()
        numbers = (op.length,) if isinstance(op, Truncate) else numbers
        if min(ids) < 0 or max(ids) >= 2**64:
            raise BadParameter(f"ops[{index}]", ids, "made of sequence ids from 0 to 2**64 - 1")
        if numbers and (min(numbers) < -(2**31) or max(numbers) >= 2**31):
            raise BadParameter(f"ops[{index}]", numbers, "made of tokens and lengths of 32 bits")
    rows = sum(map(row_count, ops))
    if rows > max_rows:
        raise BadParameter("ops", f"{rows} logit rows", f"at most {max_rows} rows in a step")
    return rows


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a logit type on the wire. Raises TransportError for one that cannot travel."""
    if dtype not in _DTYPE_NAMES:
        raise TransportError(f"dtype: {dtype} cannot be sent; allowed are {', '.join(DTYPES)}")
    return _DTYPE_NAMES[dtype]


def spec_to_proto(
    spec: ExpertSpec, *, max_rows: int, shared_memory: expert_pb2.SharedMemory | None
) -> expert_pb2.DescribeResponse:
    """Describe an expert; `max_rows`: most logit rows a step may ask for."""
    return expert_pb2.DescribeResponse(
        name=spec.name,
        architecture=spec.architecture,
        fingerprint=spec.vocabulary.fingerprint,
        width=spec.vocabulary.width,
        canonical=spec.canonical,
        max_context=spec.max_context,
        max_sequences=spec.max_sequences,
        dtype=dtype_name(spec.dtype),
        has_chat_template=spec.has_chat_template,
        max_rows_per_step=max_rows,
        shared_memory=shared_memory,
    )


def check_description(message: expert_pb2.DescribeResponse) -> None:
    """Raise TransportError unless a description can be of an expert."""
    if not _FINGERPRINT.fullmatch(message.fingerprint):
        raise TransportError(f"fingerprint: {message.fingerprint[:80]!r} is not a SHA-256 in hexadecimal")
    if message.dtype not in DTYPES:
        raise TransportError(f"dtype: {message.dtype[:80]!r} is unknown; allowed are {', '.join(DTYPES)}")
    for field in ("width", "max_context", "max_sequences", "max_rows_per_step"):
        if getattr(message, field) < 1:
            raise TransportError(f"{field}: 0 is not allowed; it must be at least 1")


def spec_from_proto(message: expert_pb2.DescribeResponse, vocabulary: Vocabulary) -> ExpertSpec:
    """Inverse of `spec_to_proto`. Raises TransportError where the two arguments do not fit each other."""
    check_description(message)
    if vocabulary.width != message.width or vocabulary.fingerprint != message.fingerprint:
        raise TransportError(
            f"vocabulary: {vocabulary.width} ids with fingerprint {vocabulary.fingerprint}, but the expert "
            f"described {message.width} with {message.fingerprint}"
        )
    return ExpertSpec(
        name=message.name,
        architecture=message.architecture,
        vocabulary=vocabulary,
        canonical=message.canonical,
        max_context=message.max_context,
        max_sequences=message.max_sequences,
        dtype=DTYPES[message.dtype],
        has_chat_template=message.has_chat_template,
    )


def _op_to_proto(op: Op) -> expert_pb2.Op:
    match op:
        case Open(sequence, tokens, rows):
            opened = expert_pb2.OpenOp(sequence=sequence, tokens=tokens, rows=_ROWS_TO_PROTO[rows])
            return expert_pb2.Op(open=opened)
        case Extend(sequence, tokens, rows):
            extended = expert_pb2.ExtendOp(sequence=sequence, tokens=tokens, rows=_ROWS_TO_PROTO[rows])
            return expert_pb2.Op(extend=extended)
        case Fork(sequence, new):
            return expert_pb2.Op(fork=expert_pb2.ForkOp(sequence=sequence, new=new))
        case Truncate(sequence, length):
            return expert_pb2.Op(truncate=expert_pb2.TruncateOp(sequence=sequence, length=length))
        case Close(sequence):
            return expert_pb2.Op(close=expert_pb2.CloseOp(sequence=sequence))


def ops_to_proto(ops: Iterable[Op]) -> list[expert_pb2.Op]:
    """Operations that `check_ops` accepted, as messages."""
    return [_op_to_proto(op) for op in ops]


def _rows_from_proto(index: int, rows: expert_pb2.Rows.ValueType) -> Rows:
    if rows not in _ROWS_FROM_PROTO:
        raise TransportError(f"ops[{index}].rows: {rows} is unknown; allowed are none, last and all")
    return _ROWS_FROM_PROTO[rows]


def _op_from_proto(index: int, message: expert_pb2.Op) -> Op:
    match message.WhichOneof("op"):
        case "open":
            opened = message.open
            return Open(opened.sequence, tuple(opened.tokens), _rows_from_proto(index, opened.rows))
        case "extend":
            extended = message.extend
            return Extend(extended.sequence, tuple(extended.tokens), _rows_from_proto(index, extended.rows))
        case "fork":
            return Fork(message.fork.sequence, message.fork.new)
        case "truncate":
            return Truncate(message.truncate.sequence, message.truncate.length)
        case "close":
            return Close(message.close.sequence)
        case None:
            raise TransportError(f"ops[{index}]: no operation is set")


def ops_from_proto(messages: Iterable[expert_pb2.Op]) -> tuple[Op, ...]:
    """Inverse of `ops_to_proto`. Raises TransportError for what is not an operation.

    Whether an operation makes sense (tokens in range, sequence known) is for the expert to say, one by one.
    """
    return tuple(_op_from_proto(index, message) for index, message in enumerate(messages))


def reply_to_proto(
    number: int,
    result: StepResult,
    *,
    seconds: float,
    batch_size: int,
) -> expert_pb2.StepReply:
    """Everything of a step's result but the logits, which `transport.put_logits` adds."""
    errors = (
        expert_pb2.OpError(index=index, kind=_KIND_TO_PROTO[error.kind], message=error.message)
        for index, error in enumerate(result.errors)
        if error is not None
    )
    return expert_pb2.StepReply(
        number=number,
        row_counts=[stop - start for start, stop in result.spans],
        errors=errors,
        dtype=dtype_name(result.logits.dtype),
        width=result.logits.shape[1],
        seconds=seconds,
        batch_size=batch_size,
    )


def _errors_from_proto(reply: expert_pb2.StepReply, n_ops: int) -> tuple[OpError | None, ...]:
    errors: list[OpError | None] = [None] * n_ops
    for error in reply.errors:
        if error.index >= n_ops or errors[error.index] is not None:
            raise TransportError(f"errors: index {error.index} is not one of {n_ops} operations, once each")
        if error.kind not in _KIND_FROM_PROTO:
            raise TransportError(f"errors[{error.index}].kind: {error.kind} is unknown")
        errors[error.index] = OpError(_KIND_FROM_PROTO[error.kind], error.message)
    return tuple(errors)


def layout_from_proto(
    reply: expert_pb2.StepReply, *, number: int, ops: Sequence[Op], width: int, dtype: torch.dtype
) -> tuple[tuple[tuple[int, int], ...], tuple[OpError | None, ...]]:
    """Spans and errors of a reply, as StepResult has them; inverse of `reply_to_proto`.

    Raises TransportError unless the reply can be the answer to step `number` with `ops`.
    """
    if reply.number != number:
        raise TransportError(f"number: step {number} was answered by step {reply.number}")
    if reply.width != width or reply.dtype != dtype_name(dtype):
        raise TransportError(
            f"logits: rows of {reply.width} {reply.dtype[:80]!r}, but the expert described rows of {width} "
            f"{dtype_name(dtype)!r}"
        )
    if not (math.isfinite(reply.seconds) and reply.seconds >= 0.0):
        raise TransportError(f"seconds: {reply.seconds} is not a duration")
    if len(reply.row_counts) != len(ops):
        raise TransportError(f"row_counts: {len(reply.row_counts)} counts for {len(ops)} operations")
    errors = _errors_from_proto(reply, len(ops))
    spans = []
    start = 0
    for index, (op, count, error) in enumerate(zip(ops, reply.row_counts, errors, strict=True)):
        expected = row_count(op) if error is None else 0
        if count != expected:
            raise TransportError(f"row_counts[{index}]: {count} rows for an operation that has {expected}")
        spans.append((start, start + count))
        start += count
    return tuple(spans), errors
