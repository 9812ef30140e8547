"""Scores of mixtures that act on tokens: of experts that share a vocabulary, and with temperatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.particle import Mixture, Rule
from token_swarm.search.score_cache.files import SHARD, ExpertKey, stored_tape
from token_swarm.search.score_cache.group_laws import ShardFiles
from token_swarm.search.score_cache.reader import Detail
from token_swarm.search.score_cache.tape import Tape
from token_swarm.search.utility import Array


@dataclass(frozen=True)
class Need:
    """What scoring a mixture takes. What the server would do decides (`token_swarm.mixing.groups.make_groups`).

    details: of each expert that the mixture runs. across: whether groups that are made of rows are mixed with others
    byte by byte, which no sum of masses gives: see `GroupLaws`. field, value, why: for a message, what decides it.
    """

    details: Mapping[str, Detail]
    across: bool = False
    field: str = ""
    value: object = None
    why: str = ""

    @property
    def detail(self) -> Detail:
        """The greatest of them."""
        return max(self.details.values())


def needed_detail(keys: Sequence[ExpertKey], mixture: Mixture) -> Need:
    """What scoring `mixture` takes of each expert.

    An expert that is alone in its group, at temperature 1, is mixed byte by byte. Others are mixed token by token:
    under the linear rule their masses add up; temperatures, powers and rules that are not built in need whole rows.
    """
    active = [key for key in keys if key.name in mixture.active]
    groups: dict[tuple[str, str], list[str]] = {}
    for key in active:
        groups.setdefault(key.group, []).append(key.name)
    hot = [key.name for key in active if mixture.temperatures.get(key.name, 1.0) != 1.0]
    shared = [name for names in groups.values() if len(names) > 1 for name in names]
    alone = not mixture.rule.normalised and len(active) == 1 and mixture.weights[active[0].name] != 1
    details: dict[str, Detail] = {}
    for names in groups.values():
        tokens = len(names) > 1
        rows = any(name in hot for name in names) or (mixture.rule is not Rule.LINEAR and (tokens or alone))
        detail = Detail.ROWS if rows else Detail.MASSES if tokens else Detail.BYTES
        details.update(dict.fromkeys(names, detail))
    across = mixture.rule is not Rule.LINEAR and len(groups) > 1 and max(details.values()) is Detail.ROWS
    if hot:
        why = "1: a temperature reshapes tokens"
        return Need(details, across, f"temperatures[{hot[0]}]", mixture.temperatures[hot[0]], why)
    if shared:
        why = f"zero for all but one of {', '.join(shared)}: they share a vocabulary and are mixed token by token"
        return Need(details, across, "weights", dict(mixture.weights), why)
    if alone:
        name = active[0].name
        why = "1 for a single expert: its power reshapes tokens"
        return Need(details, across, f"weights[{name}]", mixture.weights[name], why)
    return Need(details)


class TokenScores:
    """Reads the files of Detail.MASSES and Detail.ROWS of several experts, and scores mixtures with them.

    Mixtures of several groups under any but the linear rule: see `GroupLaws`.
    """

    def __init__(
        self,
        files: ShardFiles,
        byte_masses: Callable[[Sequence[int]], Tensor],
    ) -> None:
        """byte_masses: passages -> what each expert alone gave their bytes, [experts, positions]."""
        self._stored, self._keys, self._passages = files, files.keys, files.passages
        self._byte_masses = byte_masses
        self._groups: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(self._keys):
            self._groups.setdefault(key.group, []).append(index)

    def score(self, mixtures: Sequence[Mixture], passages: Sequence[int]) -> Array:
        """Log-probabilities, nats: float64 [mixtures, passages]. The mixtures are of one rule."""
        weights = np.asarray([[mixture.active.get(key.name, 0.0) for key in self._keys] for mixture in mixtures])
        heats = np.asarray([[mixture.temperatures.get(key.name, 1.0) for key in self._keys] for mixture in mixtures])
        rule = mixtures[0].rule
        if rule.normalised:
            weights = weights / weights.sum(axis=1, keepdims=True)
        columns = [self._passage(passage, weights, heats, rule) for passage in passages]
        return np.stack(columns, axis=1)

    def _passage(self, passage: int, weights: Array, heats: Array, rule: Rule) -> Array:
        """One passage's log-probability under each mixture: [mixtures]."""
        used = [[m for m in members if weights[:, m].any()] for members in self._groups.values()]
        probability = np.zeros((len(weights), self._passages[passage].size))
        for members in filter(None, used):
            count = (weights[:, members] != 0).sum(axis=1)
            shares = weights[:, members].sum(axis=1) if rule is Rule.LINEAR else np.ones(len(weights))
            alone = (count == 1) & (heats[:, members] == 1).all(axis=1) & (rule is Rule.LINEAR)
            if alone.any():
                own = self._byte_masses([passage]).numpy()[members]
                probability[alone] += (weights[alone][:, members, None] * own).sum(axis=1)
            mixed = np.flatnonzero((count > 0) & ~alone)
            if mixed.size == 0:
                continue
            tape = self._tape(passage, members)
            masses = [
                self._mixed(passage, members, weights[i, members] / shares[i])
                if rule is Rule.LINEAR and (heats[i, members] == 1).all()
                else self._from_rows(tape, passage, members, weights[i], heats[i], rule)
                for i in mixed
            ]
            # Under any but the linear rule a mixture has one group: nothing is added to it.
            probability[mixed] += shares[mixed, None] * np.exp(_log_probs(tape, masses))
        with np.errstate(divide="ignore"):
            total: Array = np.log(probability).sum(axis=1)
        return total

    def _mixed(self, passage: int, members: Sequence[int], own: Array) -> tuple[Array, Array]:
        """(masses, roots) of a linear mixture, whose weights inside the group are `own`: the mean of the members'."""
        stored = [self._stored.open(passage, member, Detail.MASSES) for member in members]
        names = f"{passage % SHARD}.masses", f"{passage % SHARD}.roots"
        masses, roots = (np.stack([file.get_tensor(name).numpy() for file in stored]) for name in names)
        return (own[:, None] * masses).sum(axis=0), (own[:, None, None] * roots).sum(axis=0)

    def _from_rows(
        self, tape: Tape, passage: int, members: Sequence[int], weights: Array, heats: Array, rule: Rule
    ) -> tuple[Array, Array]:
        """(masses, roots) of one mixture, from the members' logit rows."""
        active = [member for member in members if weights[member] != 0]
        rows = [self._stored.rows(passage, member) for member in active]
        table = torch.from_numpy(np.stack([weights[active], heats[active]]))[:, None].expand(-1, len(rows[0]), -1)
        vocabulary, trie = self._stored.vocabulary(active[0])
        allowed = torch.from_numpy(vocabulary.allowed.copy())
        law = kernels.mix(rows, table[0].contiguous(), table[1].contiguous(), rule, allowed)
        return tape.from_rows(law, trie, vocabulary.eos_ids)

    def _tape(self, passage: int, members: Sequence[int]) -> Tape:
        """The way all members take through the passage."""
        files = [self._stored.open(passage, member, Detail.MASSES) for member in members]
        first, *others = (stored_tape(file, passage % SHARD) for file in files)
        if not all(first.equals(other) for other in others):
            self._stored.refuse_apart(passage, members)
        return first


def _log_probs(tape: Tape, masses: Sequence[tuple[Array, Array]]) -> Array:
    return tape.log_probs(np.stack([own for own, _ in masses]), np.stack([roots for _, roots in masses]))
