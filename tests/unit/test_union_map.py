"""The union of vocabularies against its definition, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm.kernels import UnionMap
from token_swarm.kernels.union_map import Segment
from token_swarm.vocabulary import Vocabulary

Owned = dict[bytes | None, list[list[int]]]


def owners_of(vocabularies: Sequence[Vocabulary]) -> Owned:
    """Byte string (None: the end of the text) -> per expert, all ids that write it."""
    owned: Owned = {}
    for expert, vocabulary in enumerate(vocabularies):
        entries = [(data, token) for token, data in enumerate(vocabulary.token_bytes) if data is not None]
        for data, token in [*entries, *((None, token) for token in vocabulary.eos_ids)]:
            owned.setdefault(data, [[] for _ in vocabularies])[expert].append(token)
    return owned


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    # Few short strings, zero bytes among them, so that vocabularies overlap and ids repeat.
    words = st.one_of(st.none(), st.binary(min_size=1, max_size=2).map(lambda raw: bytes(byte % 3 for byte in raw)))
    table = [*draw(st.lists(words, max_size=12)), b"\x00"]
    silent = [token for token, entry in enumerate(table) if entry is None]
    return Vocabulary(tuple(table), tuple(draw(st.sets(st.sampled_from(silent))) if silent else ()))


@settings(deadline=None)
@given(st.lists(vocabularies(), min_size=1, max_size=4))
def test_the_map_is_what_its_docstring_says(tables: list[Vocabulary]) -> None:
    union = UnionMap.build(tables)
    owned = owners_of(tables)
    patterns = {data: tuple(e for e, ids in enumerate(owners) if ids) for data, owners in owned.items()}

    ordered = sorted(owned, key=lambda data: (data is None, patterns[data], data or b""))
    assert list(union.texts) == ordered
    assert union.size == len(ordered)
    assert union.ids.dtype == union.twins.dtype == torch.int32
    assert union.ids.tolist() == [[(owned[data][e] or [-1])[0] for data in ordered] for e in range(len(tables))]
    assert union.twins.tolist() == [
        [expert, token, twin]
        for token, data in enumerate(ordered)
        for expert, ids in enumerate(owned[data])
        for twin in ids[1:]
    ]

    covered = [segment.experts for segment in union.segments for _ in range(segment.low, segment.high)]
    assert covered == [patterns[data] for data in ordered]
    assert all(a.high == b.low and a.experts != b.experts for a, b in itertools.pairwise(union.segments))
    assert isinstance(union.segments[0], Segment)
    assert union.segments[0].low == 0


@settings(deadline=None)
@given(st.lists(vocabularies(), min_size=1, max_size=3))
def test_pairs_name_every_id_that_takes_part_once(tables: list[Vocabulary]) -> None:
    union = UnionMap.build(tables)
    for expert, vocabulary in enumerate(tables):
        tokens, ids = union.pairs(expert)
        assert sorted(ids.tolist()) == torch.from_numpy(vocabulary.allowed.copy()).nonzero()[:, 0].tolist()
        for token, own in zip(tokens.tolist(), ids.tolist(), strict=True):
            assert union.texts[token] == vocabulary.token_bytes[own]
            assert union.texts[token] is not None or own in vocabulary.eos_ids


def test_an_example() -> None:
    union = UnionMap.build(
        [Vocabulary((b"So", b"f", None, b"f"), (2,)), Vocabulary((None, b"Sofia", b"So", None), (0, 3))]
    )
    assert union.texts == (b"f", b"So", b"Sofia", None)
    assert union.ids.tolist() == [[1, 0, -1, 2], [-1, 2, 1, 0]]
    assert union.twins.tolist() == [[0, 0, 3], [1, 3, 3]]
    assert [segment.experts for segment in union.segments] == [(0,), (0, 1), (1,), (0, 1)]
