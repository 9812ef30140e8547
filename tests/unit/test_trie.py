from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from token_swarm.mixing.trie import ROOT, ByteTrie
from token_swarm.vocabulary import Vocabulary

TABLES = st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=5)), min_size=1, max_size=60).filter(any)


@given(table=TABLES)
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_a_node_with_its_tokens(table: list[bytes | None]) -> None:
    trie = ByteTrie.build(Vocabulary(tuple(table), ()))
    prefixes = {data[:i] for data in table if data for i in range(len(data) + 1)}
    assert trie.nodes == len(prefixes)
    for prefix in prefixes:
        node = trie.find(prefix)
        assert node is not None
        below = sorted(trie.order[trie.low[node] : trie.high[node]].tolist())
        assert below == [i for i, data in enumerate(table) if data is not None and data.startswith(prefix)]
        exact = [i for i, data in enumerate(table) if data == prefix]
        assert trie.exact(node) == exact
        for token in exact:
            assert trie.order[trie.position(token, prefix)] == token
        children = range(trie.first_child[node], trie.first_child[node + 1])
        assert bytes(trie.byte[list(children)]) == bytes(sorted({p[-1] for p in prefixes if p and p[:-1] == prefix}))
    assert trie.find(b"\x00" * 6) is None


def test_the_cache_gives_the_same_trie_and_heals(tmp_path: Path) -> None:
    vocabulary = Vocabulary((b"a", b"ab", None, b"b"), (2,))
    built = ByteTrie.cached(vocabulary, tmp_path)
    (path,) = tmp_path.iterdir()
    stored = path.read_bytes()
    for damaged in (stored, stored[:100], b"", b"x" * 400):
        path.write_bytes(damaged)
        again = ByteTrie.cached(vocabulary, tmp_path)
        for field in ("order", "low", "high", "longer", "first_child", "byte"):
            np.testing.assert_array_equal(getattr(again, field), getattr(built, field))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_position_of_a_stranger() -> None:
    trie = ByteTrie.build(Vocabulary((b"a", b"b"), ()))
    assert trie.child(ROOT, ord("c")) is None
    with pytest.raises(KeyError):
        trie.position(0, b"b")
