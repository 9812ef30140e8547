"""A text's byte law as a formula in its tokens' probabilities, for experts that are mixed token by token.

Inside a group the mixture decides how probable each tokenization of the text is, so a group's byte law cannot be put
together from its members' byte laws. But which token masses it is made of is fixed by the text and the vocabulary: the
*tape* of a passage. Given the masses of a mixture, the tape gives what `token_swarm.decoding.score` would: the
probability of each byte, over the heads that the canonical pass feeds, and the cold ones that are born at this byte.

A mass is the probability of an interval of byte-sorted tokens in one row. Row k is the law after k canonical tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.decoding.score import CanonicalPath
from token_swarm.mixing.byte_group import BOUNDARY_FLOOR, SPLIT_DISCOUNT
from token_swarm.mixing.byte_law import END, EXACT_BELOW, SYMBOLS, Array, ByteLaw
from token_swarm.mixing.trie import ROOT, ByteTrie
from token_swarm.vocabulary import Vocabulary

_ROOT, _NONE = -1, -2

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tape:
    """Which masses the law of each byte is made of.

    intervals: int64 [masses, 3], (row, low, high); the first ones are the canonical token of each row.
    visits: int64 [visits, 6], (row, byte, next, pending, fresh, canonical): the head of `row` is at a node before
    `byte`; the masses of the node's child that the byte leads to, of its longer tokens, and of the tokens that end
    here; -1 is the row's root law, -2 nothing. canonical: 1 when the canonical token is among those that end here.
    children: uint8 [visits with fresh, 33], the bytes that lead on from the node, as bits.
    """

    targets: npt.NDArray[np.uint8]
    intervals: IntArray
    visits: IntArray
    children: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, trie: ByteTrie, vocabulary: Vocabulary, path: CanonicalPath, text: bytes) -> Tape:
        """The tape of `text`, whose canonical way is `path`."""
        written = [vocabulary.token_bytes[token] or b"" for token in path.tokens]
        whole = b"".join(written)
        tail = len(whole) - len(text)  # bytes of the prompt that the first tokens write again
        starts = np.concatenate(([0], np.cumsum([len(piece) for piece in written]))).tolist()
        intervals = [
            (row, position, position + 1)
            for row, (token, piece) in enumerate(zip(path.tokens, written, strict=True))
            for position in [trie.position(token, piece)]
        ]
        visits: list[tuple[int, ...]] = []
        children: list[npt.NDArray[np.uint8]] = []

        def mass(row: int, low: int, high: int) -> int:
            if low == high:
                return _NONE
            intervals.append((row, low, high))
            return len(intervals) - 1

        for row, start in enumerate(starts[:-1]):
            if start >= tail:
                visits.append((row, start - tail, _ROOT, _ROOT, _NONE, 0))
            node = ROOT
            for at in range(start + 1, len(whole)):
                child = trie.child(node, whole[at - 1])
                if child is None:
                    break
                node = child
                low, longer, high = int(trie.low[node]), int(trie.longer[node]), int(trie.high[node])
                if at >= tail:
                    onward = trie.child(node, whole[at])
                    ahead = _NONE if onward is None else mass(row, int(trie.low[onward]), int(trie.high[onward]))
                    fresh = mass(row, low, longer)
                    visits.append((row, at - tail, ahead, mass(row, longer, high), fresh, int(at == starts[row + 1])))
                    if fresh != _NONE:
                        bits = np.zeros(SYMBOLS, dtype=np.uint8)
                        bits[trie.byte[trie.first_child[node] : trie.first_child[node + 1]]] = 1
                        children.append(np.packbits(bits))
                if longer == high:
                    break
        return cls(
            np.frombuffer(text, dtype=np.uint8).copy(),
            np.asarray(intervals, dtype=np.int64).reshape(-1, 3),
            np.asarray(visits, dtype=np.int64).reshape(-1, 6),
            np.stack(children) if children else np.zeros((0, 33), dtype=np.uint8),
        )

    @property
    def rows(self) -> int:
        """Rows that are needed: one for each token."""
        return int(self.intervals[:, 0].max()) + 1

    def equals(self, other: Tape) -> bool:
        """Whether both describe one way through one text."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def read(self, row: int, law: ByteLaw, masses: Array, roots: Array) -> None:
        """Enter one row's masses [masses] and root law [rows, 257]."""
        for index in np.flatnonzero(self.intervals[:, 0] == row).tolist():
            masses[index] = law.interval(int(self.intervals[index, 1]), int(self.intervals[index, 2]))
        law.add_next(ROOT, 1.0, roots[row])

    def log_probs(self, masses: Array, roots: Array) -> Array:
        """Log-probability of each byte: float64 [mixtures, bytes].

        masses: float64 [mixtures, masses]; roots: float64 [mixtures, rows, 257].
        """
        row, byte, ahead, pending, fresh, canonical = self.visits.T
        target = self.targets[byte]
        count, length = len(masses), len(self.targets)
        with np.errstate(divide="ignore"):
            history = np.cumsum(np.log(masses[:, : self.rows]), axis=1)
        history = np.concatenate((np.zeros((count, 1)), history[:, :-1]), axis=1)  # [mixtures, rows]
        # The latest head that is fed before each byte: its law is the law at the latest boundary.
        latest = np.zeros(length, dtype=np.int64)
        np.maximum.at(latest, byte, row)
        latest = np.maximum.accumulate(latest)
        weight = np.exp(history[:, row] - history[:, latest[byte]])  # [mixtures, visits]

        at_root = ahead == _ROOT
        given = np.where(at_root, roots[:, row, target], np.where(ahead >= 0, masses[:, ahead], 0.0))
        held = np.where(pending == _ROOT, roots.sum(2)[:, row], np.where(pending >= 0, masses[:, pending], 0.0))
        born = np.flatnonzero(fresh >= 0)
        ended = masses[:, fresh[born]] - np.where(canonical[born] == 1, masses[:, row[born]], 0.0)
        ended = np.where(ended > 1e-12 * masses[:, fresh[born]], ended, 0.0)
        boundary = roots + BOUNDARY_FLOOR
        boundary /= boundary.sum(2, keepdims=True)
        here = boundary[:, latest[byte[born]]]  # [mixtures, born, 257]
        leads = np.unpackbits(self.children, axis=1, count=SYMBOLS)
        onward = (here * leads).sum(2)
        discount = np.where(leads[np.arange(born.size), target[born]] == 1, SPLIT_DISCOUNT, 1.0)
        likely = here[:, np.arange(born.size), target[born]] * discount / (1 - (1 - SPLIT_DISCOUNT) * onward)

        numerator, total = np.zeros((count, length)), np.zeros((count, length))
        every = np.arange(count)[:, None]
        np.add.at(numerator, (every, byte[None]), weight * given)
        np.add.at(total, (every, byte[None]), weight * held)
        np.add.at(numerator, (every, byte[born][None]), weight[:, born] * ended * likely)
        np.add.at(total, (every, byte[born][None]), weight[:, born] * ended)
        with np.errstate(divide="ignore", invalid="ignore"):
            result: Array = np.log(numerator) - np.log(total)
        return result

    def from_rows(self, probabilities: Tensor, trie: ByteTrie, eos_ids: tuple[int, ...]) -> tuple[Array, Array]:
        """(masses [masses], roots [rows, 257]) of token probabilities [rows, width]."""
        in_order, sums = kernels.prefix_mass(probabilities, torch.from_numpy(trie.order))
        ordered, cumulative = in_order.numpy(), sums.numpy()
        row, low, high = self.intervals.T
        masses = cumulative[row, high] - cumulative[row, low]
        for index in np.flatnonzero(masses < EXACT_BELOW).tolist():
            masses[index] = ordered[row[index], low[index] : high[index]].sum(dtype=np.float64)
        roots = np.zeros((len(ordered), SYMBOLS))
        first, last = int(trie.first_child[ROOT]), int(trie.first_child[ROOT + 1])
        roots[:, trie.byte[first:last]] = cumulative[:, trie.high[first:last]] - cumulative[:, trie.low[first:last]]
        roots[:, END] = probabilities[:, list(eos_ids)].double().sum(1).numpy()
        return masses, roots
