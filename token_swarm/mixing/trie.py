"""The prefix trie of a vocabulary, as intervals of the byte-sorted token list.

A node stands for a byte string; the tokens that start with it are one interval of the sorted order, so the
probability of "the next bytes are ..." is one difference of a cumulative sum. Nodes are numbered breadth first:
the children of a node are consecutive nodes, sorted by byte, which makes the CSR column array implicit.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from token_swarm.files import replacing
from token_swarm.vocabulary import Vocabulary

_FORMAT = "1"
ROOT = 0

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ByteTrie:
    """Sorted tokens and the trie over them.

    order:       [tokens] token ids sorted by their bytes; equal byte strings are neighbours
    low, high:   [nodes] the interval of `order` whose tokens start with the node's bytes
    longer:      [nodes] tokens [low, longer) write exactly the node's bytes, [longer, high) write more
    first_child: [nodes + 1] children of node n are nodes first_child[n] .. first_child[n + 1]
    byte:        [nodes] the last byte of the node (0 for the root)
    """

    order: npt.NDArray[np.int64]
    low: IntArray
    high: IntArray
    longer: IntArray
    first_child: IntArray
    byte: npt.NDArray[np.uint8]

    @classmethod
    def build(cls, vocabulary: Vocabulary) -> ByteTrie:
        """Build level by level: linear in the total number of bytes after the sort."""
        table = vocabulary.token_bytes
        ids = sorted((i for i, entry in enumerate(table) if entry is not None), key=lambda i: (table[i], i))
        words = [table[i] or b"" for i in ids]
        length = np.fromiter((len(word) for word in words), dtype=np.int64, count=len(words))
        blob = np.frombuffer(b"".join(words), dtype=np.uint8)
        start = np.concatenate(([0], np.cumsum(length)[:-1]))

        low, high = [np.zeros(1, dtype=np.int64)], [np.full(1, len(ids), dtype=np.int64)]
        byte = [np.zeros(1, dtype=np.uint8)]
        ended = [np.zeros(1, dtype=np.int64)]  # tokens that write exactly a node's bytes, level by level
        children: list[npt.NDArray[np.int64]] = []
        alive = np.arange(len(ids))  # tokens longer than the level's depth, as positions in the sorted order
        parent = np.zeros(len(ids), dtype=np.int64)  # their node, numbered within the level
        depth = 0
        while alive.size:
            character = blob[start[alive] + depth]
            fresh = np.ones(alive.size, dtype=bool)
            fresh[1:] = (parent[1:] != parent[:-1]) | (character[1:] != character[:-1])
            first = np.flatnonzero(fresh)
            node = np.cumsum(fresh) - 1
            children.append(np.bincount(parent[first], minlength=low[-1].size))
            low.append(alive[first])
            # The interval also holds no shorter token: those were dropped at the level where they ended.
            high.append(np.append(alive[first[1:] - 1], alive[-1]) + 1)
            byte.append(character[first])
            depth += 1
            keep = length[alive] > depth
            ended.append(np.bincount(node[~keep], minlength=first.size))
            alive, parent = alive[keep], node[keep]
        children.append(np.zeros(low[-1].size, dtype=np.int64))

        all_low = np.concatenate(low)
        return cls(
            order=np.asarray(ids, dtype=np.int64),
            low=all_low.astype(np.int32),
            high=np.concatenate(high).astype(np.int32),
            longer=(all_low + np.concatenate(ended)).astype(np.int32),
            first_child=(1 + np.concatenate(([0], np.cumsum(np.concatenate(children))))).astype(np.int32),
            byte=np.concatenate(byte),
        )

    @classmethod
    def cached(cls, vocabulary: Vocabulary, directory: Path | None) -> ByteTrie:
        """Load the trie of `vocabulary` from `directory`, or build and keep it there; None keeps nothing.

        A damaged file is rebuilt. A reader sees no file or a whole one.
        """
        if directory is None:
            return cls.build(vocabulary)
        path = directory / f"{vocabulary.fingerprint}-{_FORMAT}.npz"
        names = [entry.name for entry in fields(cls)]
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(**{name: stored[name] for name in names})
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
        trie = cls.build(vocabulary)
        with replacing(path) as file:
            np.savez(file, **{name: getattr(trie, name) for name in names})
        return trie

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return self.low.size

    @cached_property
    def is_numbered(self) -> bool:
        """Whether ids are places in `order`: the vocabulary is in byte order itself."""
        return np.array_equal(self.order, np.arange(self.order.size))

    def child(self, node: int, byte: int) -> int | None:
        """The node one `byte` below `node`, or None when no token goes there."""
        first, last = int(self.first_child[node]), int(self.first_child[node + 1])
        position = first + int(np.searchsorted(self.byte[first:last], byte))
        return position if position < last and self.byte[position] == byte else None

    def exact(self, node: int) -> list[int]:
        """Ids of the tokens that write exactly the node's bytes."""
        tokens: list[int] = self.order[self.low[node] : self.longer[node]].tolist()
        return tokens

    def position(self, token: int, data: bytes) -> int:
        """Where `token`, which writes `data`, stands in `order`."""
        node = self.find(data)
        if node is None or token not in self.exact(node):
            raise KeyError(f"token {token} does not write {data!r} in this vocabulary")
        return int(self.low[node]) + self.exact(node).index(token)

    def find(self, data: bytes) -> int | None:
        """The node of `data`, or None when no token starts with it."""
        node: int | None = ROOT
        for byte in data:
            if node is None:
                return None
            node = self.child(node, byte)
        return node
