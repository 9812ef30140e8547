"""The byte unit of a score in logarithms: for laws so sharp that a probability would be 0 in float64.

The definition is `byte_group.ByteGroup` with a window of one byte, of which only the canonical heads are fed, and
`byte_unit.mix_bytes`. It takes some milliseconds a token, where the other takes a tenth of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from token_swarm.experts.contract import EncodedPrompt
from token_swarm.mixing.byte_group import BOUNDARY_FLOOR, MAX_HEADS, SPLIT_DISCOUNT
from token_swarm.mixing.byte_law import END, SYMBOLS, Array
from token_swarm.mixing.groups import Group
from token_swarm.mixing.trie import ROOT, ByteTrie
from token_swarm.particle import Rule

NOTHING = -np.inf


def log_sum(logs: Array) -> float:
    """Logarithm of the sum of exponentials; -inf for none."""
    top = float(logs.max()) if logs.size else NOTHING
    return top + math.log(float(np.exp(logs - top).sum())) if top > NOTHING else NOTHING


@dataclass(frozen=True)
class LogLaw:
    """A context's next-token law: log-probabilities float64 [tokens] in byte-sorted order, and of the text's end."""

    trie: ByteTrie
    log_probs: Array
    end: float

    def pending(self, node: int) -> float:
        """See `ByteLaw.pending`."""
        if node == ROOT:
            return float(np.logaddexp(log_sum(self.log_probs), self.end))
        return log_sum(self.log_probs[int(self.trie.longer[node]) : int(self.trie.high[node])])

    def next(self, node: int) -> Array:
        """Logarithms of the mass of each next symbol at `node`: [257]."""
        trie, law = self.trie, np.full(SYMBOLS, NOTHING)
        children = slice(int(trie.first_child[node]), int(trie.first_child[node + 1]))
        low, high = trie.low[children], trie.high[children]
        if low.size:
            # Children follow upon one another: one pass over all their tokens.
            first = int(low[0])
            own = self.log_probs[first : int(high[-1])]
            tops = np.maximum.reduceat(own, low - first)
            safe = np.where(tops > NOTHING, tops, 0.0)
            sums = np.add.reduceat(np.exp(own - np.repeat(safe, high - low)), low - first)
            with np.errstate(divide="ignore"):
                law[trie.byte[children]] = safe + np.log(sums)
        if node == ROOT:
            law[END] = self.end
        return law


@dataclass(slots=True, eq=False)
class LogHead:
    """As `byte_group.Head`, with logarithms for weight and pending mass."""

    tokens: tuple[int, ...]
    start: int
    weight: float
    law: LogLaw | None = None
    node: int = ROOT
    pending: float = 0.0

    @property
    def mass(self) -> float:
        """See `byte_group.Head.mass`."""
        return self.weight + self.pending


@dataclass
class LogGroup:
    """As `byte_group.ByteGroup`."""

    trie: ByteTrie
    text: bytearray
    heads: list[LogHead]
    retired: float = 0.0
    _boundary: Array = field(default_factory=lambda: np.full(SYMBOLS, -math.log(SYMBOLS)))

    @classmethod
    def start(cls, trie: ByteTrie, tokens: tuple[int, ...], tail: bytes) -> LogGroup:
        """See `ByteGroup.start`."""
        history = tokens[:-1] if tail and len(tokens) > 1 else tokens
        return cls(trie, bytearray(tail if len(history) < len(tokens) else b""), [LogHead(history, 0, 0.0)])

    @property
    def lost(self) -> bool:
        """See `ByteGroup.lost`."""
        return not self.heads

    @property
    def cold(self) -> list[LogHead]:
        """See `ByteGroup.cold`."""
        return sorted((head for head in self.heads if head.law is None), key=lambda head: -head.weight)

    def feed(self, head: LogHead, law: LogLaw) -> None:
        """See `ByteGroup.feed`."""
        head.law, head.node, head.pending = law, ROOT, law.pending(ROOT)
        boundary = np.logaddexp(math.log(BOUNDARY_FLOOR), law.next(ROOT))
        self._boundary = boundary - log_sum(boundary)
        for position in range(head.start, len(self.text)):
            if not self._walk(head, self.text[position], position + 1):
                self.heads.remove(head)
                break
        self._settle()

    def log_law(self) -> Array:
        """Log-probabilities of the next symbols: [257]; all -inf when the group is lost."""
        law = np.full(SYMBOLS, NOTHING)
        for head in self.heads:
            if head.law is not None:
                law = np.logaddexp(law, head.weight + head.law.next(head.node))
            elif head.start == len(self.text):
                law = np.logaddexp(law, head.weight + self._after_boundary(head))
        total = log_sum(law)
        return law - total if total > NOTHING else law

    def advance(self, byte: int, log_prob: float) -> None:
        """Append a byte, of which the group's own law gave `log_prob`."""
        for head in self.heads:
            if head.law is None:
                fresh = head.start == len(self.text)
                likely = max(log_prob, math.log(BOUNDARY_FLOOR))
                head.weight += float(self._after_boundary(head)[byte]) if fresh else likely
        self.text.append(byte)
        for head in tuple(self.heads):
            if head.law is not None and not self._walk(head, byte, len(self.text)):
                self.heads.remove(head)
        self._settle()
        old = [head for head in self.heads if head.law is None and head.start < len(self.text)]
        self._give_up(old)
        if len(self.heads) > MAX_HEADS:
            self._give_up(sorted(self.heads, key=lambda head: head.mass)[:-MAX_HEADS])

    def _after_boundary(self, head: LogHead) -> Array:
        law = self._boundary.copy()
        first, last = int(self.trie.first_child[head.node]), int(self.trie.first_child[head.node + 1])
        law[self.trie.byte[first:last]] += math.log(SPLIT_DISCOUNT)
        return np.asarray(law - log_sum(law), dtype=np.float64)

    def _walk(self, head: LogHead, byte: int, end: int) -> bool:
        assert head.law is not None
        child = self.trie.child(head.node, byte)
        if child is None:
            return False
        head.node = child
        for position in range(int(self.trie.low[child]), int(self.trie.longer[child])):
            weight = head.weight + float(head.law.log_probs[position])
            if weight > NOTHING:
                history = (*head.tokens, int(self.trie.order[position]))
                self.heads.append(LogHead(history, start=end, weight=weight, node=child))
        head.pending = head.law.pending(child)
        return head.pending > NOTHING

    def _settle(self) -> None:
        total = log_sum(np.array([head.mass for head in self.heads]))
        for head in self.heads:
            head.weight -= total

    def _give_up(self, heads: list[LogHead]) -> None:
        total = log_sum(np.array([head.mass for head in self.heads]))
        for head in heads:
            self.retired += (1.0 - self.retired) * math.exp(head.mass - total)
            self.heads.remove(head)


class LogUnit:
    """Several groups over one text, as the byte unit of `Ensemble.score_unit` has them."""

    def __init__(
        self, groups: Sequence[Group], tries: Mapping[str, ByteTrie], prompts: Mapping[str, EncodedPrompt]
    ) -> None:
        self.groups = tuple(groups)
        self.states: list[LogGroup] = []
        for group in self.groups:
            prompt = prompts[group.names[0]]
            tail = group.vocabulary.token_bytes[prompt.tokens[-1]] if prompt.tail else None
            self.states.append(LogGroup.start(tries[group.vocabulary.fingerprint], prompt.tokens, tail or b""))

    def make_law(self, index: int, rows: Sequence[Tensor]) -> LogLaw:
        """See `ByteUnit.make_law`."""
        group, trie = self.groups[index], self.states[index].trie
        own = group.token_log_law(rows)
        return LogLaw(trie, own[trie.order], log_sum(own[list(group.vocabulary.eos_ids)]))

    def log_laws(self) -> list[Array]:
        """Each group's own next-symbol law, [257]."""
        return [state.log_law() for state in self.states]

    def log_law(self, laws: Sequence[Array]) -> Array:
        """The mixed law of the groups' `laws`, [257]; a lost group has no say."""
        rule = self.groups[0].rule
        living = [(law, g.weight) for law, g in zip(laws, self.groups, strict=True) if law.max() > NOTHING and g.weight]
        mixed = np.zeros(SYMBOLS) if living and rule is Rule.LOG_LINEAR else np.full(SYMBOLS, NOTHING)
        if living and not rule.has_kernel:
            weights = torch.tensor([weight for _, weight in living], dtype=torch.float64)
            mixed = rule.combine(torch.from_numpy(np.stack([law for law, _ in living])), weights).numpy()
        for law, weight in living if rule.has_kernel else ():
            if rule is Rule.LINEAR:
                mixed = np.logaddexp(mixed, math.log(weight) + law)
            else:
                mixed = np.where(np.isfinite(law), mixed + weight * np.where(np.isfinite(law), law, 0.0), NOTHING)
        total = log_sum(mixed)
        return np.asarray(mixed - total if total > NOTHING else mixed, dtype=np.float64)

    def advance(self, byte: int, laws: Sequence[Array]) -> None:
        """Append one byte to every group. laws: those before it."""
        for state, law in zip(self.states, laws, strict=True):
            if not state.lost:
                state.advance(byte, float(law[byte]))

    @property
    def retired(self) -> float:
        """See `ByteUnit.retired`."""
        return max(state.retired for state in self.states)
