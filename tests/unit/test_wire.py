"""Contract dataclasses survive the wire, and nothing but a valid message comes out of it."""

from __future__ import annotations

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.rpc.errors import TransportError

from token_swarm.errors import BadParameter
from token_swarm.experts.contract import (
    Close,
    ExpertSpec,
    Extend,
    Fork,
    Open,
    OpError,
    OpErrorKind,
    Rows,
    StepResult,
    Truncate,
)
from token_swarm.v1 import expert_pb2
from token_swarm.vocabulary import Vocabulary

VOCABULARY = Vocabulary((None, b"a", b"b", b"ab"), eos_ids=(0,))
SPEC = ExpertSpec("toy", "ToyForCausalLM", VOCABULARY, "probe", 64, 8, torch.bfloat16, has_chat_template=True)

ids = st.integers(0, 2**64 - 1)
numbers = st.integers(-(2**31), 2**31 - 1)
tokens = st.lists(numbers, max_size=5).map(tuple)
operations = st.one_of(
    st.builds(Open, ids, tokens, st.sampled_from(Rows)),
    st.builds(Extend, ids, tokens, st.sampled_from(Rows)),
    st.builds(Fork, ids, ids),
    st.builds(Truncate, ids, numbers),
    st.builds(Close, ids),
)


@given(st.lists(operations, max_size=6))
def test_operations_survive_the_wire(ops):
    wire.check_ops(ops, 100)
    step = expert_pb2.Step(number=1, ops=wire.ops_to_proto(ops))
    assert wire.ops_from_proto(expert_pb2.Step.FromString(step.SerializeToString()).ops) == tuple(ops)


@pytest.mark.parametrize(
    "op", [Open(-1, (1,)), Close(2**64), Fork(0, 2**64), Extend(0, (2**31,)), Truncate(0, -(2**31) - 1)]
)
def test_operations_that_cannot_be_sent_are_refused(op):
    with pytest.raises(BadParameter, match=r"ops\[1\]"):
        wire.check_ops([Close(0), op], 100)


def test_more_rows_than_a_step_may_have_are_refused():
    assert wire.check_ops([Open(0, (1, 2), Rows.ALL), Extend(0, (1, 2)), Extend(0, (1,), Rows.NONE)], 3) == 3
    with pytest.raises(BadParameter, match="at most 2 rows"):
        wire.check_ops([Open(0, (1, 2, 3), Rows.ALL)], 2)


@pytest.mark.parametrize(
    "message",
    [
        expert_pb2.Op(),
        expert_pb2.Op(open=expert_pb2.OpenOp(tokens=[1])),
        expert_pb2.Op(extend=expert_pb2.ExtendOp(tokens=[1], rows=77)),
    ],
    ids=["no operation", "no rows", "unknown rows"],
)
def test_malformed_operations_are_refused(message):
    with pytest.raises(TransportError, match=r"ops\[0\]"):
        wire.ops_from_proto([message])


@given(st.binary(max_size=60))
def test_garbage_never_gives_anything_but_operations(data):
    try:
        ops = wire.ops_from_proto(expert_pb2.Step.FromString(data).ops)
    except (DecodeError, TransportError):
        return
    assert all(isinstance(op, Open | Extend | Fork | Truncate | Close) for op in ops)


def described(**changes):
    message = wire.spec_to_proto(SPEC, max_rows=7, shared_memory=None)
    message.MergeFrom(expert_pb2.DescribeResponse(**changes))
    return message


def test_a_spec_survives_the_wire():
    assert wire.spec_from_proto(described(), VOCABULARY) == SPEC


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "../../etc/passwd"}, {"dtype": "int4"}, {"width": 5}, {"fingerprint": "0" * 64}]
)
def test_a_spec_that_cannot_be_is_refused(changes):
    with pytest.raises(TransportError):
        wire.spec_from_proto(described(**changes), VOCABULARY)


OPS = (Open(0, (1, 2, 3), Rows.ALL), Extend(1, (1,)), Close(0), Fork(0, 2))
REFUSED = OpError(OpErrorKind.UNKNOWN_SEQUENCE, "unknown sequence 1")
RESULT = StepResult(
    torch.zeros(3, 4, dtype=torch.bfloat16), ((0, 3), (3, 3), (3, 3), (3, 3)), (None, REFUSED, None, None)
)


def reply(**changes):
    message = wire.reply_to_proto(5, RESULT, seconds=0.25, batch_size=2)
    for field, value in changes.items():
        message.ClearField(field)
        message.MergeFrom(expert_pb2.StepReply(**{field: value}))
    return message


def layout(message):
    return wire.layout_from_proto(message, number=5, ops=OPS, width=4, dtype=torch.bfloat16)


def test_a_reply_survives_the_wire():
    assert layout(expert_pb2.StepReply.FromString(reply().SerializeToString())) == (RESULT.spans, RESULT.errors)


def error(index, kind=expert_pb2.OP_ERROR_KIND_INVALID):
    return expert_pb2.OpError(index=index, kind=kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 4},
        {"width": 5},
        {"dtype": "float32"},
        {"seconds": float("nan")},
        {"seconds": -1.0},
        {"row_counts": [3, 0, 0]},
        {"row_counts": [2, 0, 0, 0]},
        {"row_counts": [3, 1, 0, 0]},
        {"row_counts": [3, 0, 0, 1]},
        {"row_counts": [2**32 - 1, 0, 0, 0]},
        {"errors": [error(4)]},
        {"errors": [error(1), error(1)]},
        {"errors": [error(1, 0)]},
        {"errors": []},
    ],
    ids=repr,
)
def test_a_reply_that_is_no_answer_is_refused(changes):
    with pytest.raises(TransportError):
        layout(reply(**changes))


@given(st.binary(max_size=80))
def test_garbage_is_never_an_answer(data):
    try:
        message = expert_pb2.StepReply.FromString(data)
    except DecodeError:
        return
    with pytest.raises(TransportError):
        layout(message)
