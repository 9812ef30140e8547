"""One token distribution as masses over the byte trie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from token_swarm import kernels
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
    """A context's next-token distribution, laid out so that a byte string's mass is one subtraction.

    probabilities: [tokens] in byte-sorted order; cumulative: float64 [tokens + 1]; end: probability that the text
    ends here. `members` holds the same for every expert of a group with several (for their shares), and
    `unshaped` makes the law before temperature and filters (for text that those exclude).
    """

    trie: ByteTrie
    probabilities: npt.NDArray[np.floating]
    cumulative: Array
    end: float
    members: tuple[ByteLaw, ...] = ()
    make_unshaped: Callable[[], ByteLaw] | None = None

    @cached_property
    def unshaped(self) -> ByteLaw:
        """The law before temperature and filters; itself when there are none."""
        return self.make_unshaped() if self.make_unshaped else self

    def interval(self, low: int, high: int) -> float:
        """Mass of the sorted tokens [low, high), to full relative precision."""
        mass = float(self.cumulative[high] - self.cumulative[low])
        if mass < EXACT_BELOW:
            mass = float(self.probabilities[low:high].sum(dtype=np.float64))
        return mass

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
        first, last = int(trie.first_child[node]), int(trie.first_child[node + 1])
        masses = self.cumulative[trie.high[first:last]] - self.cumulative[trie.low[first:last]]
        for position in np.flatnonzero(masses < EXACT_BELOW).tolist():
            masses[position] = self.interval(int(trie.low[first + position]), int(trie.high[first + position]))
        law[trie.byte[first:last]] += weight * masses
        if node == ROOT:
            law[END] += weight * self.end


class LawMaker:
    """Builds byte laws for one group: keeps the trie's order as a tensor, once."""

    def __init__(self, trie: ByteTrie, eos_ids: tuple[int, ...]) -> None:
        self.trie = trie
        self._order = torch.from_numpy(trie.order.astype(np.int32))
        self._eos_ids = eos_ids

    def __call__(
        self,
        probabilities: Tensor,
        members: tuple[ByteLaw, ...] = (),
        make_unshaped: Callable[[], ByteLaw] | None = None,
    ) -> ByteLaw:
        """The byte law of token probabilities [width]."""
        own = probabilities.numpy()
        end = float(sum(own[eos].item() for eos in self._eos_ids))
        ordered, cumulative = kernels.prefix_mass(probabilities[None], self._order)
        return ByteLaw(self.trie, ordered[0].numpy(), cumulative[0].numpy(), end, members, make_unshaped)
