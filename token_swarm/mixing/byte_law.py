"""One token distribution as masses over the byte trie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.kernels import STRIDE
from token_swarm.mixing.trie import ROOT, ByteTrie

SYMBOLS = 257
"""The byte alphabet and the end of text."""
END = 256
"""Index of the end-of-text symbol `$`."""

Array = npt.NDArray[np.float64]

# Below this the difference of two cumulative sums near 1 has lost digits, and the interval is summed itself.
EXACT_BELOW = 1e-7


@dataclass(frozen=True)
class ByteLaw:
    """A context's next-token distribution, laid out so that a byte string's mass is one subtraction and a short sum.

    probabilities: [tokens] in byte-sorted order; sums: float64 [tokens // STRIDE + 1], of what comes before every
    STRIDE-th token; end: probability that the text ends here. `members` holds the same for every expert of a group
    with several (for their shares), and `unshaped` makes the law before temperature and filters (for text that those
    exclude).
    """

    trie: ByteTrie
    probabilities: npt.NDArray[np.floating]
    sums: Array
    end: float
    members: tuple[ByteLaw, ...] = ()
    make_unshaped: Callable[[], ByteLaw] | None = None

    @cached_property
    def unshaped(self) -> ByteLaw:
        """The law before temperature and filters; itself when there are none."""
        return self.make_unshaped() if self.make_unshaped else self

    def interval(self, low: int, high: int) -> float:
        """Mass of the sorted tokens [low, high), to full relative precision."""
        first, last = -(-low // STRIDE), high // STRIDE
        if first < last:
            mass = float(self.sums[last] - self.sums[first])
            mass += self._sum(low, first * STRIDE) + self._sum(last * STRIDE, high)
            if mass >= EXACT_BELOW:
                return mass
        return self._sum(low, high)

    def _sum(self, low: int, high: int) -> float:
        return float(self.probabilities[low:high].sum(dtype=np.float64))

    def pending(self, node: int) -> float:
        """Mass of what may still follow at `node`: longer tokens, and at the root the end of the text."""
        if node == ROOT:
            return self.interval(0, len(self.trie.order)) + self.end
        return self.interval(int(self.trie.longer[node]), int(self.trie.high[node]))

    def next_mass(self, node: int, symbol: int) -> float:
        """Mass of one next symbol at `node`: what `add_next` would add for it."""
        if symbol == END:
            return self.end if node == ROOT else 0.0
        child = self.trie.child(node, symbol)
        return 0.0 if child is None else self.interval(int(self.trie.low[child]), int(self.trie.high[child]))

    def add_next(self, node: int, weight: float, law: Array) -> None:
        """Add `weight` times the mass of each next symbol at `node` to `law` [257]."""
        trie = self.trie
        children = slice(int(trie.first_child[node]), int(trie.first_child[node + 1]))
        bounds = zip(trie.low[children].tolist(), trie.high[children].tolist(), strict=True)
        masses = np.array([self.interval(low, high) for low, high in bounds], dtype=np.float64)
        law[trie.byte[children]] += weight * masses
        if node == ROOT:
            law[END] += weight * self.end


class LawMaker:
    """Builds byte laws for one group: keeps the trie's order as the kernels take it, once."""

    def __init__(self, trie: ByteTrie, eos_ids: tuple[int, ...]) -> None:
        self.trie = trie
        self._eos_ids = eos_ids
        self._order: Tensor | int = trie.order.size
        self._every: Tensor | int = trie.order.size + len(eos_ids)
        """All ids that may be generated: those that write something, and those that end the text."""
        if not trie.is_numbered or eos_ids != tuple(range(trie.order.size, self._every)):
            self._every = torch.from_numpy(np.concatenate([trie.order, eos_ids]).astype(np.int32))
            self._order = self._every[: trie.order.size]

    def __call__(
        self,
        probabilities: Tensor,
        members: tuple[ByteLaw, ...] = (),
        make_unshaped: Callable[[], ByteLaw] | None = None,
    ) -> ByteLaw:
        """The byte law of token probabilities [width]."""
        own = probabilities.numpy()
        end = float(sum(own[eos].item() for eos in self._eos_ids))
        ordered, sums = kernels.prefix_mass(probabilities[None], self._order, STRIDE)
        return ByteLaw(self.trie, ordered.numpy()[0], sums.numpy()[0], end, members, make_unshaped)

    def of_logits(self, row: Tensor, temperatures: Tensor) -> ByteLaw | None:
        """The byte law of the softmax of a logit row [width], in one pass; None if it is none. temperatures: [1]."""
        tokens = self.trie.order.size
        ordered, sums = kernels.softmax_masses(row[None], temperatures, self._every, tokens)
        own = ordered.numpy()[0]
        if math.isnan(own[0]):
            return None
        return ByteLaw(self.trie, own[:tokens], sums.numpy()[0], float(own[tokens:].sum(dtype=np.float64)))
