"""One group's next-byte law, marginalised over the tokenizations of the text (DESIGN 3 and 4).

A head is a token history (its context) together with the bytes of the text that come after it. Its weight is the
probability of its history. While the text grows, a head walks down the trie; where its bytes are a whole token, the
history with that token becomes a head of its own, which needs a forward before it can say what comes next.

    text        " So" | "f"
    head 1      [ctx]             pending " Sof"     walks on towards " Sofia"
    head 2      [ctx, " So"]      pending "f"        born when " So" was complete; cold until it is forwarded

A head without a forward is *cold*: its bytes have at most its weight, so with M the mass of the forwarded heads and
U the weight of the cold ones, whatever is said of the cold ones leaves the law within total variation U / (M + U)
of the exact one. `due` names cold heads, heaviest first, until that bound is at most epsilon.

M shrinks with every byte while the bound of a cold head stays, so each of them ends up due, and their number grows
with the text: `window=None` pays for that and keeps the bound on every path. Otherwise the weight of a cold head is
what it probably is. Its first byte follows `_boundary`: the law at the latest token boundary, with a discount on
bytes that would have made a longer token, because models rarely split a word where their tokenizer would not. After
that the head is taken to foresee the text as the group does. A head that does matter then shows, for the text leaves
the forwarded heads no other way. Cold heads that are not due for `window` bytes, and the lightest ones beyond
MAX_HEADS, are given up; `retired` is the probability that the text's own tokenization was among those.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from token_swarm.mixing.byte_law import END, SYMBOLS, Array, ByteLaw
from token_swarm.mixing.trie import ROOT, ByteTrie

# A share of float64 rounding: colder than this changes no digit of the law, even at epsilon 0.
NEGLIGIBLE = 2.0**-52

MAX_HEADS = 32
"""Heads of one group that are followed when a window is set. Real texts need two to six."""

SPLIT_DISCOUNT = 0.05
"""How much less likely a model is to split a token than to use it, when both write the text."""

# What `_boundary` gives every symbol at least: a boundary law from elsewhere in the text excludes nothing.
BOUNDARY_FLOOR = 1e-6


@dataclass(slots=True, eq=False)
class Head:
    """A token history and what is known after it.

    weight: probability of the history, relative to the other heads of the group. start: offset in the text at
    which the history's bytes end. law: None while cold. node: trie node of the pending bytes; while cold,
    of the history's last token.
    pending: probability, under the law, that longer tokens follow at the node; 1 while cold.
    """

    tokens: tuple[int, ...]
    start: int
    weight: float
    law: ByteLaw | None = None
    node: int = ROOT
    pending: float = 1.0

    @property
    def mass(self) -> float:
        """Probability of the history and the pending bytes; for a cold head its upper bound."""
        return self.weight * self.pending


@dataclass
class ByteGroup:
    """The heads of one group over one text.

    epsilon: largest total variation between `law` and the law over the heads that are kept. window: bytes after
    which a head that is still cold is given up; None gives up nothing and keeps the bound on every path.
    `retired`: probability that the text's own tokenization was given up.
    """

    trie: ByteTrie
    epsilon: float
    window: int | None = None
    text: bytearray = field(default_factory=bytearray)
    heads: list[Head] = field(default_factory=list)
    retired: float = 0.0
    lost: bool = False
    """Set when no tokenization of this vocabulary writes the text: the group has no law any more."""
    _boundary: Array | None = None
    _law: Array | None = None

    @classmethod
    def start(
        cls, trie: ByteTrie, tokens: tuple[int, ...], tail: bytes, *, epsilon: float, window: int | None
    ) -> ByteGroup:
        """A group after the prompt `tokens`, of which the last writes `tail` and is taken back (if it does)."""
        history = tokens[:-1] if tail and len(tokens) > 1 else tokens
        pending = tail if len(history) < len(tokens) else b""
        head = Head(history, start=0, weight=1.0)
        return cls(trie, epsilon, window, text=bytearray(pending), heads=[head])

    def fork(self) -> ByteGroup:
        """An independent copy: laws are shared, they never change."""
        return replace(self, text=bytearray(self.text), heads=[replace(head) for head in self.heads])

    @property
    def cold(self) -> list[Head]:
        """Heads that no forward was run for, heaviest first."""
        return sorted((head for head in self.heads if head.law is None), key=lambda head: -head.weight)

    @property
    def certificate(self) -> float:
        """Upper bound of the total variation between `law` and the law over the heads that are kept."""
        unknown = sum(head.mass for head in self.cold)
        return unknown / self._total if unknown else 0.0

    @property
    def _total(self) -> float:
        """Mass of all heads, those that are cold at their bound."""
        return sum(head.mass for head in self.heads)

    @property
    def history(self) -> tuple[int, ...]:
        """Tokens of the head with the most mass, the likeliest tokenization of the text; none when lost."""
        return max(self.heads, key=lambda head: head.mass).tokens if self.heads else ()

    @property
    def history_length(self) -> int:
        """Number of tokens in `history`."""
        return len(self.history)

    def due(self) -> list[Head]:
        """Cold heads that must be forwarded before `law` is within epsilon; empty when it is."""
        if self.lost:
            return []
        cold = self.cold
        unknown = sum(head.mass for head in cold)
        limit = max(self.epsilon, NEGLIGIBLE) * self._total
        due = []
        for head in cold:
            if unknown <= limit:
                break
            due.append(head)
            unknown -= head.mass
        return due

    @property
    def nodes(self) -> list[int]:
        """Trie nodes of the heads that have a law."""
        return [head.node for head in self.heads if head.law is not None]

    def unshape(self) -> None:
        """Give every head its law before temperature and filters."""
        for head in self.heads:
            head.law = head.law.unshaped if head.law is not None else None
        self._law = None

    def feed(self, head: Head, law: ByteLaw) -> None:
        """Give a cold head its law and let it walk the bytes that came after its history."""
        head.law = law
        head.node, head.pending = ROOT, law.pending(ROOT)
        self._law = None
        if self.window is not None:
            boundary = np.full(SYMBOLS, BOUNDARY_FLOOR)
            law.add_next(ROOT, 1.0, boundary)
            self._boundary = boundary / boundary.sum()
        for position in range(head.start, len(self.text)):
            if not self._walk(head, self.text[position], position + 1):
                self.heads.remove(head)
                break
        self._settle()

    def law(self) -> Array:
        """The next-symbol law: float64 [257], the last entry is the end of the text. Zeros when lost."""
        if self._law is None:
            law = np.zeros(SYMBOLS)
            for head in self.heads:
                if head.law is not None:
                    head.law.add_next(head.node, head.weight, law)
                elif self._boundary is not None and head.start == len(self.text):
                    law += head.weight * self._after_boundary(head)
            total = law.sum()
            self._law = law / total if total > 0 else law
        return self._law

    def _after_boundary(self, head: Head) -> Array:
        """The likely law of a cold head that has just been born: [257]."""
        assert self._boundary is not None
        law = self._boundary.copy()
        first, last = int(self.trie.first_child[head.node]), int(self.trie.first_child[head.node + 1])
        law[self.trie.byte[first:last]] *= SPLIT_DISCOUNT
        scaled: Array = law / law.sum()
        return scaled

    def member_shares(self, symbol: int) -> Array:
        """How much of the chosen symbol's mass each member of the group gave: [members], unnormalised."""
        shares = [
            [head.weight * member.next_mass(head.node, symbol) for member in head.law.members]
            for head in self.heads
            if head.law is not None and head.law.members
        ]
        return np.sum(shares, axis=0) if shares else np.ones(1)

    def advance(self, byte: int) -> None:
        """Append one byte of text: every head moves to its child, heads on whole tokens have offspring."""
        if byte == END:
            raise ValueError("the end of the text is not a byte: stop instead of advancing")
        if not self._reaches(byte):
            # Temperature or a filter excluded what the other groups chose: this group's own law did not.
            self.unshape()
        if self._boundary is not None:
            likely = max(float(self.law()[byte]), BOUNDARY_FLOOR)
            for head in self.heads:
                if head.law is None:
                    fresh = head.start == len(self.text)
                    head.weight *= float(self._after_boundary(head)[byte]) if fresh else likely
        self._law = None
        self.text.append(byte)
        end = len(self.text)
        for head in tuple(self.heads):
            if head.law is not None and not self._walk(head, byte, end):
                self.heads.remove(head)
        self._settle()
        self._retire()

    def _reaches(self, byte: int) -> bool:
        return any(head.law is None or head.law.next_mass(head.node, byte) > 0 for head in self.heads)

    def _walk(self, head: Head, byte: int, end: int) -> bool:
        """Move a head one byte down; returns whether anything longer is left to wait for."""
        assert head.law is not None
        child = self.trie.child(head.node, byte)
        if child is None:
            return False
        head.node = child
        low, longer = int(self.trie.low[child]), int(self.trie.longer[child])
        for position in range(low, longer):
            weight = head.weight * float(head.law.probabilities[position])
            if weight > 0:
                history = (*head.tokens, int(self.trie.order[position]))
                self.heads.append(Head(history, start=end, weight=weight, node=child))
        head.pending = head.law.pending(child)
        return head.pending > 0

    def _settle(self) -> None:
        """Rescale so that weights never underflow, and notice when nothing is left."""
        total = self._total
        if total > 0:
            for head in self.heads:
                head.weight /= total
        else:
            self.lost = True
            self.heads.clear()

    def _retire(self) -> None:
        if self.window is None or self.lost:
            return
        horizon = len(self.text) - self.window
        old = [head for head in self.heads if head.law is None and head.start <= horizon]
        if old:
            due = self.due()
            self._give_up([head for head in old if head not in due])
        if len(self.heads) > MAX_HEADS:
            self._give_up(sorted(self.heads, key=lambda head: head.mass)[:-MAX_HEADS])

    def _give_up(self, heads: list[Head]) -> None:
        total = self._total
        for head in heads:
            self.retired += (1.0 - self.retired) * head.mass / total
            self.heads.remove(head)
