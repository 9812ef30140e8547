"""Messages of an expert that are right but for some fields, and whether a caller takes them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from token_swarm_server.expert_protocol import messages as wire
from token_swarm_server.expert_protocol import shared_memory as transport
from token_swarm_server.rpc.errors import TransportError

from tests.integration import fuzzing
from token_swarm.experts.contract import Close, Extend, Open, Rows
from token_swarm.experts.toy import ToyExpert
from token_swarm.v1 import expert_pb2


def lies(truth: Any, draw: Any, wrong: dict[str, st.SearchStrategy[Any]], most: int = 2) -> Any:
    """`truth` with up to `most` of its fields changed."""
    message = type(truth)()
    message.CopyFrom(truth)
    for field in sorted(draw(st.sets(st.sampled_from(sorted(wrong)), max_size=most))):
        value = draw(wrong[field])
        message.ClearField(field)
        fuzzing.set_field(message, field, value)
    return message


def true_reply(*ops: Any) -> tuple[list[Any], Any]:
    result = ToyExpert("e0", fuzzing.VOCABULARIES[0], seed=0).step(ops)
    reply = wire.reply_to_proto(1, result, seconds=0.1, batch_size=1)
    transport.put_logits(reply, result.logits, None, None)
    return list(ops), reply


TRUE_REPLIES = [
    true_reply(),
    true_reply(Open(1, (97,))),
    true_reply(Open(1, (97,)), Extend(1, (98, 99), Rows.ALL), Close(1)),
    true_reply(Extend(1, (98,)), Open(1, (97,)), Open(1, (97,))),
]


@st.composite
def step_replies(draw: Any) -> tuple[list[Any], Any]:
    """Operations, and a reply to them that is right but for some fields."""
    ops, truth = draw(st.sampled_from(TRUE_REPLIES))
    error = st.builds(expert_pb2.OpError, index=fuzzing.counts, kind=fuzzing.enums, message=fuzzing.words)
    wrong: dict[str, st.SearchStrategy[Any]] = {
        "number": fuzzing.big_counts,
        "row_counts": st.lists(fuzzing.counts, max_size=4),
        "errors": st.lists(error, min_size=1, max_size=3),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16", "int8", "object", ""]) | fuzzing.words,
        "width": fuzzing.counts,
        "slot": fuzzing.counts,
        "inline": st.binary(max_size=16) | st.just(truth.inline + b"\0" * 8) | st.just(truth.inline[:-1]),
        "seconds": fuzzing.numbers,
        "batch_size": fuzzing.counts,
    }
    return ops, lies(truth, draw, wrong)


def taken(ops: list[Any], reply: Any, segment: transport.SegmentReader | None) -> bool:
    """Whether a reply is accepted; if so it must have the form that was asked for."""
    vocabulary = fuzzing.VOCABULARIES[0]
    try:
        spans, errors = wire.layout_from_proto(reply, number=1, ops=ops, width=vocabulary.width, dtype=torch.float64)
        rows = spans[-1][1] if spans else 0
        logits = transport.take_logits(reply, rows, torch.float64, segment, 1)
    except TransportError:
        return False
    assert logits.shape == (rows, vocabulary.width)
    assert len(spans) == len(errors) == len(ops)
    return True
