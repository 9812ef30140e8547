"""The byte unit with its groups in C++: whole stretches of bytes are chosen in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from token_swarm.kernels import native
from token_swarm.kernels.byte_walk import ByteWalk, HeadView, LawView, Status, Stretch, WalkGroup, Which, law_view
from token_swarm.mixing.byte_group import (
    BOUNDARY_FLOOR,
    MAX_HEADS,
    NEGLIGIBLE,
    SPLIT_DISCOUNT,
    ByteGroup,
)
from token_swarm.mixing.byte_law import END, EXACT_BELOW, Array, ByteLaw
from token_swarm.mixing.byte_unit import ByteUnit, GroupState
from token_swarm.mixing.sampling import Sampler
from token_swarm.mixing.trie import ByteTrie
from token_swarm.mixing.unit import Need, Walk, walk_by_symbol
from token_swarm.particle import Rule

_NO_LIMIT = 2**62
"""Tokens that no text has, and that C++ can still count."""


@dataclass(frozen=True, slots=True)
class NativeHead:
    """A cold head by its key; `tokens` is its history."""

    key: int
    tokens: tuple[int, ...]


class NativeGroup:
    """One group of a `ByteWalk`, as `ByteGroup`; keeps the arrays of the laws that its heads use."""

    def __init__(self, walk: ByteWalk, index: int, trie: ByteTrie, prompt: tuple[int, ...]) -> None:
        self.trie = trie
        self._walk = walk
        self._index = index
        self._prompt = prompt  # the first head's history
        self._laws: dict[int, ByteLaw] = {}

    def due(self) -> list[NativeHead]:
        """See `ByteGroup.due`."""
        return [self.head(view) for view in self._walk.due() if view.group == self._index]

    @property
    def cold(self) -> list[NativeHead]:
        """See `ByteGroup.cold`."""
        return [self.head(view) for view in self._walk.heads(self._index, Which.COLD)]

    def head(self, view: HeadView) -> NativeHead:
        """One of the group's own."""
        return NativeHead(view.key, self._prompt + self._walk.history(self._index, view.history))

    def feed(self, head: NativeHead, law: ByteLaw) -> None:
        """See `ByteGroup.feed`."""
        slot = next(slot for slot in range(len(self._laws) + 1) if slot not in self._laws)
        self._put(slot, law)
        used = self._walk.feed(self._index, head.key, slot)
        if len(used) < len(self._laws):
            self._laws = {slot: self._laws[slot] for slot in used}

    def _put(self, slot: int, law: ByteLaw) -> None:
        self._laws[slot] = law
        self._walk.put_law(self._index, slot, _view(law), [_view(member) for member in law.members])

    def unshape(self) -> None:
        """Give every head its law before temperature and filters."""
        for slot in {view.law for view in self._walk.heads(self._index, Which.ALL)} - {-1}:
            self._put(slot, self._laws[slot].unshaped)

    @property
    def nodes(self) -> list[int]:
        """See `ByteGroup.nodes`."""
        return [view.node for view in self._walk.heads(self._index, Which.ALL) if view.law >= 0]

    def law(self) -> Array:
        """See `ByteGroup.law`."""
        return self._walk.law(self._index)

    def member_shares(self, symbol: int) -> Array:
        """See `ByteGroup.member_shares`."""
        return self._walk.member_masses(self._index, symbol)

    def reaches(self, byte: int) -> bool:
        """Whether the byte has any probability."""
        return self._walk.reaches(self._index, byte)

    def advance(self, byte: int) -> None:
        """See `ByteGroup.advance`."""
        if byte == END:
            raise ValueError("the end of the text is not a byte: stop instead of advancing")
        if not self.reaches(byte):
            self.unshape()
        self._walk.advance(self._index, byte)

    @property
    def lost(self) -> bool:
        """See `ByteGroup.lost`."""
        return bool(self._walk.view(self._index).lost)

    @property
    def certificate(self) -> float:
        """See `ByteGroup.certificate`."""
        return float(self._walk.view(self._index).certificate)

    @property
    def retired(self) -> float:
        """See `ByteGroup.retired`."""
        return float(self._walk.view(self._index).retired)

    @property
    def history(self) -> tuple[int, ...]:
        """See `ByteGroup.history`."""
        view = self._walk.view(self._index)
        return self._prompt + self._walk.history(self._index, view.best_history) if view.heads else ()

    @property
    def history_length(self) -> int:
        """See `ByteGroup.history_length`."""
        return int(self._walk.view(self._index).best_length)


def _view(law: ByteLaw) -> LawView:
    return law_view(law.probabilities, law.sums, law.end)


class NativeByteUnit(ByteUnit):
    """A `ByteUnit` whose groups live in one `ByteWalk`, the `walker`."""

    walker: ByteWalk
    _natives: list[NativeGroup]

    def _states(self, starts: list[ByteGroup]) -> Sequence[GroupState]:
        groups = []
        for group, start, length in zip(self.groups, starts, self._prompt_lengths, strict=True):
            trie, (head,) = start.trie, start.heads
            groups.append(
                WalkGroup(
                    order=trie.order,
                    low=trie.low,
                    high=trie.high,
                    longer=trie.longer,
                    first_child=trie.first_child,
                    byte=trie.byte,
                    epsilon=start.epsilon,
                    window=start.window,
                    max_heads=MAX_HEADS,
                    split_discount=SPLIT_DISCOUNT,
                    boundary_floor=BOUNDARY_FLOOR,
                    negligible=NEGLIGIBLE,
                    exact_below=EXACT_BELOW,
                    weight=group.weight,
                    exponents=group.exponents,
                    history_tokens=len(head.tokens),
                    prompt_tokens=length,
                    tail=bytes(start.text),
                )
            )
        self.walker = ByteWalk(groups, log_linear=self.groups[0].rule is Rule.LOG_LINEAR)
        self._natives = [
            NativeGroup(self.walker, index, start.trie, start.heads[0].tokens) for index, start in enumerate(starts)
        ]
        return self._natives

    def due(self) -> list[Need]:
        """See `ByteUnit.due`."""
        needs = []
        for view in self.walker.due():
            head = self._natives[view.group].head(view)
            needs.append(Need(view.group, head.tokens, head))
        return needs

    def walk(self, sampler: Sampler, *, max_bytes: int, max_tokens: int | None) -> Walk:
        """Choose bytes until some group needs a forward."""
        walk, shares = Walk(), [0.0] * self.walker.experts
        while True:
            room = max_bytes - len(walk.data)
            stretch = self._stretch(sampler, room, max_tokens)
            walk.data += stretch.data
            walk.log_probs += stretch.log_probs
            walk.certificate = max(walk.certificate, stretch.certificate)
            shares = [sum(both) for both in zip(shares, stretch.shares, strict=True)]
            names = [name for group in self.groups for name in group.names]
            if stretch.status is Status.NOTHING_FOLLOWS:
                # One symbol as the definition chooses it, which is known to do without the groups' shaped laws.
                one = walk_by_symbol(self, sampler, max_bytes=1, max_tokens=max_tokens)
                walk.data += one.data
                walk.log_probs += one.log_probs
                walk.certificate = max(walk.certificate, one.certificate)
                shares = [share + one.shares.get(name, 0.0) for name, share in zip(names, shares, strict=True)]
                if one.data and not self._reached(walk, max_bytes, max_tokens):
                    continue
                walk.ended = one.ended
                walk.shares = dict(zip(names, shares, strict=True))
                return walk
            if stretch.status is not Status.NEEDS_UNSHAPED:
                walk.ended = stretch.status is Status.ENDED
                walk.shares = dict(zip(names, shares, strict=True))
                return walk
            # A filter excluded what the mixture chose; once every such group has its own law the walk goes on.
            for state in self._natives:
                if not state.lost and not state.reaches(stretch.symbol):
                    state.unshape()

    def _reached(self, walk: Walk, max_bytes: int, max_tokens: int | None) -> bool:
        return len(walk.data) >= max_bytes or (max_tokens is not None and self.fewest_tokens() >= max_tokens)

    def _stretch(self, sampler: Sampler, room: int, max_tokens: int | None) -> Stretch:
        most = min(max_tokens or 0, _NO_LIMIT)
        stretch = self.walker.walk(
            uniforms=sampler.uniforms(room + 1), script=sampler.script, max_bytes=room, max_tokens=most
        )
        sampler.consume(len(stretch.log_probs))
        return stretch


def byte_unit_type(rule: Rule = Rule.LINEAR) -> type[ByteUnit]:
    """The fastest byte unit for a rule on this machine."""
    return NativeByteUnit if rule.has_kernel and native.library() is not None else ByteUnit
