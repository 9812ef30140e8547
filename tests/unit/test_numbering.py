"""An expert's token ids beside its model's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm.experts.contract import Close, Extend, Op, Open, Rows
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.mixing.trie import ByteTrie
from token_swarm.vocabulary import Vocabulary

entries = st.one_of(st.none(), st.binary(min_size=1, max_size=3))


@settings(max_examples=200, deadline=None)
@given(table=st.lists(entries, min_size=1, max_size=40).filter(any), data=st.data())
def test_every_token_keeps_its_meaning(table: list[bytes | None], data: st.DataObject) -> None:
    silent = [index for index, entry in enumerate(table) if entry is None]
    ends = data.draw(st.lists(st.sampled_from(silent), unique=True)) if silent else []
    models = Vocabulary(tuple(table), tuple(ends))
    numbering = Numbering(models)
    own = numbering.vocabulary
    assert own.width == models.width
    for new, old in enumerate(numbering.columns.tolist()):
        assert own.token_bytes[new] == models.token_bytes[old]
        assert (new in own.eos_ids) == (old in models.eos_ids)
    everything = range(own.width)
    assert numbering.from_model(numbering.to_model(everything)) == tuple(everything)
    # What may be generated comes first, and in the order in which the byte unit wants it.
    trie = ByteTrie.build(own)
    assert np.array_equal(trie.order, np.arange(trie.order.size))
    assert own.eos_ids == tuple(range(trie.order.size, trie.order.size + len(ends)))


def test_numbering_twice_changes_nothing() -> None:
    once = Numbering(Vocabulary((b"b", None, b"a", b"b", None), eos_ids=(4,)))
    assert once.columns.tolist() == [2, 0, 3, 4, 1]
    assert Numbering(once.vocabulary).columns.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("op", [Open(1, (0, 1), Rows.NONE), Extend(1, (0, 1), Rows.ALL), Close(1)])
def test_operations_on_tokens_are_translated(op: Op) -> None:
    numbering = Numbering(Vocabulary((b"b", b"a"), ()))
    expected = type(op)(1, (1, 0), op.rows) if isinstance(op, Open | Extend) else op
    assert numbering.op_to_model(op) == expected
