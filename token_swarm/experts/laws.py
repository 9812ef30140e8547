"""The laws of the expert contract, as assertions any backend's test can call.

Each law takes an expert with no open sequences and leaves it so. `atol` bounds the absolute difference of
logits (0.0 for an exact backend). A broken law raises AssertionError and says where.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch

from token_swarm.experts.contract import (
    Close,
    Expert,
    Extend,
    Fork,
    Op,
    Open,
    OpErrorKind,
    Rows,
    StepResult,
    Truncate,
)

Law: TypeAlias = Callable[[Expert, np.random.Generator, float], object]

_PROBE = 1 << 40
"""A sequence id that no law uses for anything but a fresh prefill."""


def random_tokens(expert: Expert, rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """`count` tokens that the expert may generate."""
    return tuple(rng.choice(np.flatnonzero(expert.spec.vocabulary.allowed), size=count).tolist())


def fresh_rows(expert: Expert, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logit rows after each of `tokens`, from one prefill of a fresh sequence: [len(tokens), width]."""
    return _applied(expert, [Open(_PROBE, tokens, Rows.ALL), Close(_PROBE)]).rows(0)


def step_equals_one_by_one(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """One step of several operations, even on the same sequence, returns what single-operation steps do."""
    first, second, third = (random_tokens(expert, rng, int(rng.integers(1, 9))) for _ in range(3))
    ops: list[Op] = [
        Open(1, first),
        Extend(1, second, Rows.ALL),
        Fork(1, 2),
        Truncate(1, len(first)),
        Extend(1, third),
        Extend(2, third, Rows.ALL),
        Extend(9, third),
        Close(1),
        Open(1, second, Rows.ALL),
        Extend(2, first, Rows.NONE),
        Truncate(2, 0),
        Extend(2, third, Rows.LAST),
        Truncate(2, 99),
        Open(2, first),
    ]
    together = expert.step(ops)
    _release(expert, [1, 2])
    for index, op in enumerate(ops):
        alone = expert.step([op])
        _same_error(together, index, alone, f"operation {index} ({op})")
        _close_to(together.rows(index), alone.rows(0), atol, f"operation {index} ({op}) of one step")
    _release(expert, [1, 2])


def batched_equals_alone(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """A ragged batch returns for each sequence what that sequence alone gets."""
    count = min(6, expert.spec.max_sequences - 1)
    texts = [random_tokens(expert, rng, int(rng.integers(1, 20))) for _ in range(count)]
    more = [random_tokens(expert, rng, int(rng.integers(1, 5))) for _ in range(count)]
    opened = _applied(expert, [Open(sequence, text) for sequence, text in enumerate(texts)])
    extended = _applied(expert, [Extend(sequence, new, Rows.ALL) for sequence, new in enumerate(more)])
    for sequence, (text, new) in enumerate(zip(texts, more, strict=True)):
        alone = fresh_rows(expert, text + new)
        _close_to(opened.rows(sequence), alone[len(text) - 1 : len(text)], atol, f"open in slot {sequence}")
        _close_to(extended.rows(sequence), alone[len(text) :], atol, f"extend in slot {sequence}")
    _release(expert, range(count))


def chunked_prefill_equals_whole(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """Feeding a text in pieces returns the rows that feeding it at once does."""
    tokens = random_tokens(expert, rng, min(40, expert.spec.max_context))
    cuts = [0, *sorted(set(rng.integers(1, len(tokens), size=4).tolist())), len(tokens)]
    rows = []
    for start, stop in itertools.pairwise(cuts):
        piece = tokens[start:stop]
        op: Op = Extend(1, piece, Rows.ALL) if start else Open(1, piece, Rows.ALL)
        rows.append(_applied(expert, [op]).rows(0))
    _close_to(torch.cat(rows), fresh_rows(expert, tokens), atol, f"prefill cut at {cuts}")
    _release(expert, [1])


def last_row_is_last_of_all(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """Rows.LAST is the last row of Rows.ALL, Rows.ALL has one row per token and Rows.NONE has none."""
    tokens = random_tokens(expert, rng, 7)
    result = _applied(
        expert, [Open(1, tokens, Rows.ALL), Open(2, tokens, Rows.LAST), Open(3, tokens, Rows.NONE)]
    )
    shapes = [tuple(result.rows(index).shape) for index in range(3)]
    width = expert.spec.vocabulary.width
    _check(shapes == [(7, width), (1, width), (0, width)], f"rows of ALL, LAST and NONE have shapes {shapes}")
    dtype = result.logits.dtype
    _check(dtype == expert.spec.dtype, f"rows are {dtype}, not {expert.spec.dtype}")
    _close_to(result.rows(1), result.rows(0)[-1:], atol, "Rows.LAST")
    _release(expert, [1, 2, 3])


def truncate_then_extend_equals_fresh(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """After a rollback a sequence behaves as if the tokens taken back had never been there."""
    tokens = random_tokens(expert, rng, min(30, expert.spec.max_context))
    _applied(expert, [Open(1, tokens, Rows.NONE)])
    length = len(tokens)
    held = tokens
    for _ in range(4):
        length = int(rng.integers(0, length + 1))
        new = random_tokens(expert, rng, int(rng.integers(1, 4)))
        held = held[:length] + new
        rows = _applied(expert, [Truncate(1, length), Extend(1, new, Rows.ALL)]).rows(1)
        _close_to(rows, fresh_rows(expert, held)[length:], atol, f"extend after truncating to {length}")
        length = len(held)
    _release(expert, [1])


def fork_is_independent(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """A fork continues its source's text, and neither sees what the other does later."""
    text, left, right = random_tokens(expert, rng, 12), *(random_tokens(expert, rng, 3) for _ in range(2))
    _applied(expert, [Open(1, text, Rows.NONE), Fork(1, 2), Extend(1, left, Rows.NONE)])
    forked = _applied(expert, [Extend(2, right, Rows.ALL)]).rows(0)
    _close_to(forked, fresh_rows(expert, text + right)[len(text) :], atol, "extend of a fork")
    _applied(expert, [Truncate(1, 0), Close(1)])
    after = _applied(expert, [Extend(2, left, Rows.ALL)]).rows(0)
    expected = fresh_rows(expert, text + right + left)[len(text + right) :]
    _close_to(after, expected, atol, "extend of a fork whose source is closed")
    _release(expert, [2])


def refused_operations_change_nothing(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """A refused operation says why and leaves its sequence and the rest of its step alone."""
    text, new = random_tokens(expert, rng, 6), random_tokens(expert, rng, 2)
    width = expert.spec.vocabulary.width
    _applied(expert, [Open(1, text, Rows.NONE)])
    refused: list[tuple[Op, OpErrorKind]] = [
        (Extend(7, new), OpErrorKind.UNKNOWN_SEQUENCE),
        (Fork(7, 8), OpErrorKind.UNKNOWN_SEQUENCE),
        (Truncate(7, 0), OpErrorKind.UNKNOWN_SEQUENCE),
        (Open(1, new), OpErrorKind.SEQUENCE_EXISTS),
        (Fork(1, 1), OpErrorKind.SEQUENCE_EXISTS),
        (Truncate(1, len(text) + 1), OpErrorKind.INVALID),
        (Truncate(1, -1), OpErrorKind.INVALID),
        (Extend(1, ()), OpErrorKind.INVALID),
        (Open(8, (width,)), OpErrorKind.INVALID),
        (Extend(1, (0, -1)), OpErrorKind.INVALID),
    ]
    result = expert.step([*(op for op, _ in refused), Close(7), Extend(1, new, Rows.ALL)])
    for index, (op, kind) in enumerate(refused):
        error = result.errors[index]
        _check(error is not None and error.kind is kind, f"{op} gave {error}, expected {kind}")
        _check(result.rows(index).shape[0] == 0, f"{op} was refused and yet has logit rows")
    _check(result.errors[-2:] == (None, None), f"valid operations were refused: {result.errors[-2:]}")
    expected = fresh_rows(expert, text + new)[len(text) :]
    _close_to(result.rows(len(refused) + 1), expected, atol, "extend beside refused operations")
    _release(expert, [1])


def close_frees_the_sequence(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """`max_sequences` sequences can be open, one more is refused, and closing makes room again."""
    count = expert.spec.max_sequences
    tokens = random_tokens(expert, rng, 2)
    for _ in range(2):
        _applied(expert, [Open(sequence, tokens, Rows.NONE) for sequence in range(count)])
        errors = expert.step([Open(count, tokens), Fork(0, count), Close(0), Fork(1, count)]).errors
        kinds = [error.kind if error else None for error in errors]
        full = OpErrorKind.NO_FREE_SEQUENCE
        _check(kinds == [full, full, None, None], f"with every sequence in use: {kinds}")
        row = _applied(expert, [Extend(count, tokens)]).rows(0)
        _release(expert, range(count + 1))
        _close_to(row, fresh_rows(expert, tokens + tokens)[-1:], atol, "extend in a reused slot")


def context_full_is_an_error(expert: Expert, rng: np.random.Generator, atol: float) -> None:
    """A sequence holds `max_context` tokens and not one more; rolling back makes room again."""
    size = expert.spec.max_context
    tokens = random_tokens(expert, rng, size)
    too_long = expert.step([Open(1, (*tokens, tokens[0])), Open(1, tokens[:-2], Rows.NONE)])
    result = expert.step([Extend(1, tokens[-2:] + tokens[:1]), Extend(1, tokens[-2:]), Extend(1, tokens[:1])])
    kinds = [error.kind if error else None for error in (*too_long.errors, *result.errors)]
    full = OpErrorKind.CONTEXT_FULL
    _check(kinds == [full, None, full, None, full], f"around {size} tokens: {kinds}")
    again = _applied(expert, [Truncate(1, size - 1), Extend(1, tokens[-1:])]).rows(1)
    _close_to(again, result.rows(1), atol, "the last row of a full context")
    _release(expert, [1])


def random_operations_equal_fresh(
    expert: Expert, rng: np.random.Generator, atol: float, *, steps: int = 40, longest: int = 48
) -> float:
    """After any operations a sequence's rows are those of a fresh prefill of its token history.

    Runs `steps` random steps on sequences of up to `longest` tokens and returns the largest difference.
    """
    held: dict[int, tuple[int, ...]] = {}
    worst = 0.0
    longest = min(longest, expert.spec.max_context)
    for number in range(steps):
        ops = _random_step(expert, rng, held, longest)
        before = dict(held)
        result = _applied(expert, [op for op, _ in ops])
        for index, (op, history) in enumerate(ops):
            if history is not None:
                rows = result.rows(index)
                expected = fresh_rows(expert, history)[len(history) - rows.shape[0] :]
                worst = max(worst, _close_to(rows, expected, atol, f"step {number}, {op}, from {before}"))
    _release(expert, list(held))
    return worst


def tokenize_writes_the_text(expert: Expert, texts: Sequence[str]) -> None:
    """Canonical tokens write exactly their text, and a prompt's tail is its last token's bytes."""
    vocabulary = expert.spec.vocabulary
    for text in texts:
        written = vocabulary.text(expert.tokenize(text))
        _check(written == text.encode(), f"tokens of {text!r} write {written!r}")
        for chat in (False, True):
            encoded = expert.encode(text, chat=chat)
            _check(len(encoded.tokens) > 0, f"prompt {text!r} has no tokens")
            tail = len(vocabulary.text(encoded.tokens[-1:]))
            _check(encoded.tail == tail, f"tail of prompt {text!r} is {encoded.tail}, not {tail}")


LAWS: tuple[Law, ...] = (
    step_equals_one_by_one,
    batched_equals_alone,
    chunked_prefill_equals_whole,
    last_row_is_last_of_all,
    truncate_then_extend_equals_fresh,
    fork_is_independent,
    refused_operations_change_nothing,
    close_frees_the_sequence,
    context_full_is_an_error,
    random_operations_equal_fresh,
)
"""Every law that needs nothing but an expert."""


def _random_step(
    expert: Expert, rng: np.random.Generator, held: dict[int, tuple[int, ...]], longest: int
) -> list[tuple[Op, tuple[int, ...] | None]]:
    """Random operations with, where one returns rows, the token history those rows follow."""
    ops: list[tuple[Op, tuple[int, ...] | None]] = []
    room = expert.spec.max_sequences - 1
    for _ in range(int(rng.integers(1, 9))):
        sequence = int(rng.integers(0, room + 2))
        rows = Rows.ALL if rng.random() < 0.5 else Rows.LAST
        size = 1 if rng.random() < 0.5 else int(rng.integers(1, max(2, longest // 3)))
        new = random_tokens(expert, rng, size)
        if sequence not in held:
            if len(held) >= room:
                continue
            sources = list(held)
            if sources and rng.random() < 0.4:
                source = sources[int(rng.integers(len(sources)))]
                held[sequence] = held[source]
                ops.append((Fork(source, sequence), None))
            else:
                held[sequence] = new
                ops.append((Open(sequence, new, rows), new))
        elif rng.random() < 0.1:
            del held[sequence]
            ops.append((Close(sequence), None))
        elif rng.random() < 0.3 or len(held[sequence]) + size > longest:
            length = int(rng.integers(0, len(held[sequence]) + 1))
            held[sequence] = held[sequence][:length]
            ops.append((Truncate(sequence, length), None))
        else:
            held[sequence] += new
            ops.append((Extend(sequence, new, rows), held[sequence]))
    return ops


def _applied(expert: Expert, ops: Sequence[Op]) -> StepResult:
    result = expert.step(ops)
    for op, error in zip(ops, result.errors, strict=True):
        _check(error is None, f"{op} was refused: {error}")
    _check(len(result.spans) == len(ops), f"{len(ops)} operations gave {len(result.spans)} spans")
    return result


def _release(expert: Expert, sequences: Sequence[int]) -> None:
    _applied(expert, [Close(sequence) for sequence in sequences])


def _same_error(one: StepResult, index: int, other: StepResult, what: str) -> None:
    found, expected = one.errors[index], other.errors[0]
    _check(found == expected, f"{what}: error {found} in one step, {expected} alone")


def _close_to(found: torch.Tensor, expected: torch.Tensor, atol: float, what: str) -> float:
    _check(found.shape == expected.shape, f"{what}: rows {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not found.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    # Equal infinities have no difference.
    worst = float(torch.where(found == expected, 0.0, (found - expected).abs()).max())
    _check(worst <= atol, f"{what}: logits differ by {worst:.3g}, allowed is {atol:.3g}")
    return worst


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
