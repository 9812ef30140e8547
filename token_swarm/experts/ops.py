"""Which operations of a step are refused, and what the others do to the sequence lengths.

Every backend keeps its own KV, but all of them answer a bad operation alike: they ask `refusal` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

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
    Truncate,
)


def refusal(op: Op, lengths: Mapping[int, int], spec: ExpertSpec) -> OpError | None:
    """Why `op` cannot be applied to sequences of `lengths` tokens, or None when it can."""
    match op:
        case Open(sequence, tokens):
            if sequence in lengths:
                return OpError(OpErrorKind.SEQUENCE_EXISTS, f"open: sequence {sequence} exists already")
            return _bad_tokens(op, tokens, 0, spec) or _no_free_sequence(op, lengths, spec)
        case Extend(sequence, tokens):
            if sequence not in lengths:
                return _unknown(op, sequence)
            return _bad_tokens(op, tokens, lengths[sequence], spec)
        case Fork(sequence, new):
            # First, so that any other error says that `new` does not exist: who keeps count of sequences relies on it.
            if new in lengths:
                return OpError(OpErrorKind.SEQUENCE_EXISTS, f"fork: sequence {new} exists already")
            if sequence not in lengths:
                return _unknown(op, sequence)
            return _no_free_sequence(op, lengths, spec)
        case Truncate(sequence, length):
            if sequence not in lengths:
                return _unknown(op, sequence)
            if not 0 <= length <= lengths[sequence]:
                allowed = f"0 to {lengths[sequence]}, the length of sequence {sequence}"
                return OpError(OpErrorKind.INVALID, f"truncate: length is {length}, allowed is {allowed}")
            return None
        case Close():
            return None
        case _:
            assert_never(op)


def apply_lengths(op: Op, lengths: dict[int, int]) -> None:
    """Record in `lengths` what `op`, which was not refused, does to them."""
    match op:
        case Open(sequence, tokens):
            lengths[sequence] = len(tokens)
        case Extend(sequence, tokens):
            lengths[sequence] += len(tokens)
        case Fork(sequence, new):
            lengths[new] = lengths[sequence]
        case Truncate(sequence, length):
            lengths[sequence] = length
        case Close(sequence):
            lengths.pop(sequence, None)
        case _:
            assert_never(op)


def row_count(op: Op) -> int:
    """Logit rows that `op` returns when it is not refused."""
    if not isinstance(op, Open | Extend) or op.rows is Rows.NONE:
        return 0
    return len(op.tokens) if op.rows is Rows.ALL else 1


def _name(op: Op) -> str:
    return type(op).__name__.lower()


def _unknown(op: Op, sequence: int) -> OpError:
    return OpError(OpErrorKind.UNKNOWN_SEQUENCE, f"{_name(op)}: no sequence {sequence} is open")


def _no_free_sequence(op: Op, lengths: Mapping[int, int], spec: ExpertSpec) -> OpError | None:
    if len(lengths) < spec.max_sequences:
        return None
    message = f"{_name(op)}: all {spec.max_sequences} sequences (max_sequences) of {spec.name} are in use"
    return OpError(OpErrorKind.NO_FREE_SEQUENCE, message)


def _bad_tokens(op: Op, tokens: tuple[int, ...], held: int, spec: ExpertSpec) -> OpError | None:
    if not tokens:
        return OpError(OpErrorKind.INVALID, f"{_name(op)}: tokens is empty, at least one is needed")
    width = spec.vocabulary.width
    if min(tokens) < 0 or max(tokens) >= width:
        bad = next(token for token in tokens if not 0 <= token < width)
        return OpError(OpErrorKind.INVALID, f"{_name(op)}: token {bad} is not in 0 to {width - 1}")
    if held + len(tokens) > spec.max_context:
        message = (
            f"{_name(op)}: {held} held and {len(tokens)} new tokens exceed the {spec.max_context} tokens "
            f"(max_context) of {spec.name}"
        )
        return OpError(OpErrorKind.CONTEXT_FULL, message)
    return None
