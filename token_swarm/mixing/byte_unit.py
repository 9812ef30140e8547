"""The byte unit: groups with different vocabularies, mixed byte by byte and exactly (DESIGN 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from token_swarm.errors import BadLogits, NoContinuation
from token_swarm.experts.contract import EncodedPrompt
from token_swarm.mixing.byte_group import ByteGroup
from token_swarm.mixing.byte_law import END, SYMBOLS, Array, ByteLaw, LawMaker
from token_swarm.mixing.groups import Group, Unit, as_shares
from token_swarm.mixing.sampling import Sampler, Sampling
from token_swarm.mixing.stopwatch import Part, Stopwatch
from token_swarm.mixing.trie import ROOT, ByteTrie
from token_swarm.mixing.unit import Need, Walk, walk_by_symbol
from token_swarm.particle import Rule


class ColdHead(Protocol):
    """A token history without a forward: see `byte_group.Head`."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The history."""
        ...


class GroupState(Protocol):
    """What a byte unit asks of a group: `ByteGroup`, or the same in C++."""

    @property
    def trie(self) -> ByteTrie:
        """The trie of the group's vocabulary."""
        ...

    @property
    def lost(self) -> bool:
        """See `ByteGroup.lost`."""
        ...

    @property
    def certificate(self) -> float:
        """See `ByteGroup.certificate`."""
        ...

    @property
    def retired(self) -> float:
        """See `ByteGroup.retired`."""
        ...

    @property
    def history(self) -> tuple[int, ...]:
        """See `ByteGroup.history`."""
        ...

    @property
    def history_length(self) -> int:
        """See `ByteGroup.history_length`."""
        ...

    @property
    def cold(self) -> Sequence[ColdHead]:
        """See `ByteGroup.cold`."""
        ...

    @property
    def nodes(self) -> Sequence[int]:
        """See `ByteGroup.nodes`."""
        ...

    def unshape(self) -> None:
        """See `ByteGroup.unshape`."""
        ...

    def due(self) -> Sequence[ColdHead]:
        """See `ByteGroup.due`."""
        ...

    def feed(self, head: Any, law: ByteLaw, /) -> None:
        """See `ByteGroup.feed`."""
        ...

    def law(self) -> Array:
        """See `ByteGroup.law`."""
        ...

    def member_shares(self, symbol: int) -> Array:
        """See `ByteGroup.member_shares`."""
        ...

    def advance(self, byte: int) -> None:
        """See `ByteGroup.advance`."""
        ...


class ByteUnit:
    """Several groups over one text. Symbols are the 256 bytes and the end of the text (256).

    `tries` maps a vocabulary fingerprint to its trie; `prompts` an expert to its encoding of the prompt.
    `laws[g]` is group g's own law at this position.
    """

    kind = Unit.BYTE

    def __init__(
        self,
        groups: Sequence[Group],
        tries: Mapping[str, ByteTrie],
        prompts: Mapping[str, EncodedPrompt],
        sampling: Sampling,
        *,
        epsilon: float,
        window: int | None,
    ) -> None:
        self.groups: Sequence[Group] = tuple(groups)
        self.stopwatch = Stopwatch()
        self._sampling = sampling
        self._makers: list[LawMaker] = []
        starts: list[ByteGroup] = []
        for group in self.groups:
            trie = tries[group.vocabulary.fingerprint]
            prompt = prompts[group.names[0]]
            tail = group.vocabulary.token_bytes[prompt.tokens[-1]] if prompt.tail else None
            self._makers.append(LawMaker(trie, group.vocabulary.eos_ids))
            starts.append(ByteGroup.start(trie, prompt.tokens, tail or b"", epsilon=epsilon, window=window))
        self._prompt_lengths = [len(prompts[group.names[0]].tokens) for group in self.groups]
        self.states: Sequence[GroupState] = self._states(starts)

    def _states(self, starts: list[ByteGroup]) -> Sequence[GroupState]:
        """What the groups are kept in from here on."""
        return starts

    def due(self) -> list[Need]:
        """Cold heads of every group that its law cannot do without."""
        return [Need(g, head.tokens, head) for g, state in enumerate(self.states) for head in state.due()]

    def ahead(self, need: Need, rows: Sequence[Tensor], stopwatch: Stopwatch) -> Callable[[], ByteLaw]:
        """Makes the law of one head."""
        return partial(self._law, need.group, rows, stopwatch)

    def feed(self, need: Need, rows: Sequence[Tensor], made: ByteLaw | None = None) -> None:
        """Give one head its law."""
        law = self.make_law(need.group, rows) if made is None else made
        with self.stopwatch.measure(Part.WALK):
            self.states[need.group].feed(need.key, law)

    def make_law(self, group: int, rows: Sequence[Tensor]) -> ByteLaw:
        """The byte law of a group's mixed and shaped token distribution."""
        return self._law(group, rows, self.stopwatch)

    def _law(self, group: int, rows: Sequence[Tensor], stopwatch: Stopwatch) -> ByteLaw:
        make, mixed = self._makers[group], self.groups[group]
        if mixed.is_sharp or self._sampling.is_wide:
            rows = [row.double() for row in rows]
        heat = mixed.only_temperature
        if heat is not None and not self._sampling.changes_law and rows[0].device.type == "cpu":
            # Nothing to mix: what is left is a softmax, made where its masses are needed.
            with stopwatch.measure(Part.PREFIX_MASS):
                mixed.check(rows)
                law = make.of_logits(rows[0], heat)
            if law is None:
                raise BadLogits(mixed.names)
            return law
        with stopwatch.measure(Part.MIX):
            probabilities = mixed.token_law(rows)
            own = mixed.member_laws(rows) if len(rows) > 1 else []
            shaped = self._sampling.apply(probabilities) if self._sampling.changes_law else None
        with stopwatch.measure(Part.PREFIX_MASS):
            members = tuple(make(law) for law in own)
            if shaped is None:
                return make(probabilities, members)
            return make(shaped, members, make_unshaped=lambda: make(probabilities, members))

    @property
    def laws(self) -> list[Array]:
        """Each group's own next-symbol law, [257]; zeros for a group that is lost."""
        return [state.law() for state in self.states]

    def law(self) -> Array:
        """The mixed law over 257 symbols. Groups that are lost have no say."""
        return mix_bytes(self.laws, [group.weight for group in self.groups], self.groups[0].rule)

    def relaxed_law(self) -> Array:
        """The law where the groups' shaped laws exclude each other: of the symbols that some group with a positive
        weight keeps (all, if no other group can write those), by the mixture of the laws before temperature and
        filters, at the temperature.

        All zeros when the vocabularies have no symbol in common. Raises NoContinuation when they have.
        """
        if not self._have_a_symbol_in_common():
            return np.zeros(SYMBOLS)
        kept = np.any([law > 0 for law, group in zip(self.laws, self.groups, strict=True) if group.weight > 0], axis=0)
        for state in self.states:
            state.unshape()
        whole = self.law()
        law = np.where(kept, whole, 0.0)
        law = law if law.any() else whole
        if not self._sampling.changes_law or not law.any():
            raise NoContinuation(name for group in self.groups for name in group.names)
        law = (law / law.max()) ** (1 / self._sampling.temperature)
        relaxed: Array = law / law.sum()
        return relaxed

    def _have_a_symbol_in_common(self) -> bool:
        """Whether the vocabularies of the groups that are not lost can write one after the text so far."""
        common = np.ones(SYMBOLS, dtype=bool)
        for group, state in zip(self.groups, self.states, strict=True):
            if not state.lost:
                own = np.zeros(SYMBOLS, dtype=bool)
                trie = state.trie
                for node in state.nodes:
                    own[trie.byte[trie.first_child[node] : trie.first_child[node + 1]]] = True
                    own[END] |= node == ROOT and bool(group.vocabulary.eos_ids)
                common &= own
        return bool(common.any()) and not all(state.lost for state in self.states)

    def walk(self, sampler: Sampler, *, max_bytes: int, max_tokens: int | None) -> Walk:
        """Choose bytes until some group needs a forward."""
        return walk_by_symbol(self, sampler, max_bytes=max_bytes, max_tokens=max_tokens)

    def ends(self, symbol: int) -> bool:
        """Whether the symbol is the end of the text."""
        return symbol == END

    def advance(self, symbol: int) -> bytes:
        """Append one byte to every group."""
        for state in self.states:
            if not state.lost:
                state.advance(symbol)
        return bytes((symbol,))

    def shares(self, symbol: int) -> dict[str, float]:
        """Posterior share of each expert in the chosen symbol, with |weight| as prior under either rule."""
        given: dict[str, float] = {}
        for group, state, law in zip(self.groups, self.states, self.laws, strict=True):
            members = group.split(state.member_shares(symbol) if not state.lost else np.ones(1))
            for name, share in members.items():
                given[name] = abs(group.weight) * float(law[symbol]) * share
        return as_shares(given)

    def history(self, group: int) -> tuple[int, ...]:
        """Tokens of the likeliest head, without its pending bytes."""
        return self.states[group].history

    def own_tokens(self, group: int) -> int:
        """Tokens of the likeliest head beyond the prompt's; bytes that are pending are no token yet."""
        return max(0, self.states[group].history_length - self._prompt_lengths[group])

    def fewest_tokens(self) -> int:
        """Tokens of the group that needs fewest; one that is lost has no tokens for the text."""
        counts = [self.own_tokens(index) for index, state in enumerate(self.states) if not state.lost]
        return min(counts, default=0)

    @property
    def certificate(self) -> float:
        """Largest bound over the groups; the linear rule's mixed law is within it too."""
        return max(state.certificate for state in self.states)

    @property
    def retired(self) -> float:
        """Largest probability, over the groups, that the text's own tokenization was given up."""
        return max(state.retired for state in self.states)


def mix_bytes(laws: Sequence[Array], weights: Sequence[float], rule: Rule) -> Array:
    """Mix byte laws ([257] each) of groups; a law of zeros belongs to a lost group and is left out.

    linear: sum_g W_g P_g; log-linear: proportional to prod_g P_g^W_g; any other rule: its `combine`. Under log-linear a
    symbol that a group with negative weight excludes is excluded, as one that a group with positive weight excludes: 0
    to a negative power is no law.
    """
    living = [(law, weight) for law, weight in zip(laws, weights, strict=True) if law.any() and weight != 0]
    if not living:
        return np.zeros(SYMBOLS)
    if not rule.has_kernel:
        logs = torch.from_numpy(np.stack([law for law, _ in living])).log()
        joint = rule.combine(logs, torch.tensor([weight for _, weight in living], dtype=torch.float64)).numpy()
        if not (joint > -np.inf).any():
            return np.zeros(SYMBOLS)
        mixed = np.exp(joint - joint.max())
    elif rule is Rule.LINEAR:
        mixed = np.sum([weight * law for law, weight in living], axis=0)
    else:
        possible = np.all([law > 0 for law, _ in living], axis=0)
        if not possible.any():
            return np.zeros(SYMBOLS)
        logs = np.sum([weight * np.log(law, where=possible, out=np.zeros(SYMBOLS)) for law, weight in living], axis=0)
        mixed = np.exp(np.where(possible, logs - logs[possible].max(), -np.inf))
    total: Array = mixed / mixed.sum()
    return total
