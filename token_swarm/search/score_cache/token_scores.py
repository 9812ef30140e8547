"""Scores of mixtures that act on tokens: of experts that share a vocabulary, and with temperatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.mixing.trie import ByteTrie
from token_swarm.particle import Mixture, Rule
from token_swarm.search.score_cache.files import SHARD, VOCABULARY, ExpertKey, folder_of, open_shard, stored_tape
from token_swarm.search.score_cache.reader import Detail, Passage
from token_swarm.search.score_cache.tape import Tape
from token_swarm.search.utility import Array
from token_swarm.vocabulary import Vocabulary


def needed_detail(keys: Sequence[ExpertKey], mixture: Mixture) -> tuple[Detail | None, str, object, str]:
    """(what scoring `mixture` takes, and, for a message: the field that decides it, its value, why).

    None: nothing that is cached would do. What the server would do decides (`token_swarm.mixing.groups.make_groups`).
    """
    active = [key for key in keys if key.name in mixture.active]
    groups: dict[tuple[str, str], list[str]] = {}
    for key in active:
        groups.setdefault(key.group, []).append(key.name)
    shared = [name for names in groups.values() if len(names) > 1 for name in names]
    heated = [key.name for key in active if mixture.temperatures.get(key.name, 1.0) != 1.0]
    field: str
    value: object
    if heated:
        field, value = f"temperatures[{heated[0]}]", mixture.temperatures[heated[0]]
        why = "1: a temperature reshapes tokens"
    elif shared:
        field, value = "weights", dict(mixture.weights)
        why = f"zero for all but one of {', '.join(shared)}: they share a vocabulary and are mixed token by token"
    elif mixture.rule is Rule.LOG_LINEAR and len(active) == 1 and mixture.weights[active[0].name] != 1:
        field, value = f"weights[{active[0].name}]", mixture.weights[active[0].name]
        why = "1 for a single expert: its power reshapes tokens"
    else:
        return Detail.BYTES, "", None, ""
    if mixture.rule is Rule.LINEAR:
        return (Detail.ROWS if heated else Detail.MASSES), field, value, why
    return (Detail.ROWS if len(groups) == 1 else None), field, value, why


class TokenScores:
    """Reads the files of Detail.MASSES and Detail.ROWS of several experts, and scores mixtures with them."""

    def __init__(
        self,
        root: Path,
        data_hash: str,
        keys: Sequence[ExpertKey],
        passages: Sequence[Passage],
        byte_masses: Callable[[Sequence[int]], Tensor],
    ) -> None:
        """byte_masses: passages -> what each expert alone gave their bytes, [experts, positions]."""
        self._root, self._data, self._keys, self._passages = root, data_hash, tuple(keys), tuple(passages)
        self._byte_masses = byte_masses
        self._groups: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(keys):
            self._groups.setdefault(key.group, []).append(index)
        self._files: dict[tuple[int, int, Detail], Any] = {}
        self._vocabularies: dict[int, tuple[Vocabulary, ByteTrie]] = {}

    def score(self, mixtures: Sequence[Mixture], detail: Detail, passages: Sequence[int]) -> Array:
        """Log-probabilities, nats: float64 [mixtures, passages]. The mixtures are of one rule and need `detail`."""
        weights = np.asarray([[mixture.active.get(key.name, 0.0) for key in self._keys] for mixture in mixtures])
        heats = np.asarray([[mixture.temperatures.get(key.name, 1.0) for key in self._keys] for mixture in mixtures])
        rule = mixtures[0].rule
        if rule is Rule.LINEAR:
            weights = weights / weights.sum(axis=1, keepdims=True)
        columns = [self._passage(passage, weights, heats, rule, detail) for passage in passages]
        return np.stack(columns, axis=1)

    def _passage(self, passage: int, weights: Array, heats: Array, rule: Rule, detail: Detail) -> Array:
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
            if detail is Detail.ROWS:
                masses = [self._from_rows(tape, passage, members, weights[i], heats[i], rule) for i in mixed]
            else:
                masses = self._mixed(passage, members, weights[mixed][:, members] / shares[mixed, None])
            # Under the log-linear rule a mixture has one group: nothing is added to it.
            probability[mixed] += shares[mixed, None] * np.exp(_log_probs(tape, masses))
        with np.errstate(divide="ignore"):
            total: Array = np.log(probability).sum(axis=1)
        return total

    def _mixed(self, passage: int, members: Sequence[int], shares: Array) -> list[tuple[Array, Array]]:
        """(masses, roots) of each linear mixture: the weighted mean of the members'."""
        stored = [self._file(passage, member, Detail.MASSES) for member in members]
        names = f"{passage % SHARD}.masses", f"{passage % SHARD}.roots"
        masses, roots = (np.stack([file.get_tensor(name).numpy() for file in stored]) for name in names)
        return [((own[:, None] * masses).sum(axis=0), (own[:, None, None] * roots).sum(axis=0)) for own in shares]

    def _from_rows(
        self, tape: Tape, passage: int, members: Sequence[int], weights: Array, heats: Array, rule: Rule
    ) -> tuple[Array, Array]:
        """(masses, roots) of one mixture, from the members' logit rows."""
        active = [member for member in members if weights[member] != 0]
        rows = [self._file(passage, member, Detail.ROWS).get_tensor(f"{passage % SHARD}.rows") for member in active]
        table = torch.from_numpy(np.stack([weights[active], heats[active]]))[:, None].expand(-1, len(rows[0]), -1)
        vocabulary, trie = self._vocabulary(active[0])
        allowed = torch.from_numpy(vocabulary.allowed.copy())
        law = kernels.mix(rows, table[0].contiguous(), table[1].contiguous(), rule, allowed)
        return tape.from_rows(law, trie, vocabulary.eos_ids)

    def _tape(self, passage: int, members: Sequence[int]) -> Tape:
        """The way all members take through the passage."""
        first, *others = (stored_tape(self._file(passage, m, Detail.MASSES), passage % SHARD) for m in members)
        if not all(first.equals(other) for other in others):
            names = ", ".join(self._keys[member].name for member in members)
            allowed = f"one that {names} read alike: after their prompts, they split it differently"
            raise BadParameter(f"passages[{passage}]", self._passages[passage].text, allowed)
        return first

    def _vocabulary(self, member: int) -> tuple[Vocabulary, ByteTrie]:
        if member not in self._vocabularies:
            folder = folder_of(self._root, self._data, self._keys[member])
            vocabulary = Vocabulary.from_bytes((folder / VOCABULARY).read_bytes())
            self._vocabularies[member] = vocabulary, ByteTrie.build(vocabulary)
        return self._vocabularies[member]

    def _file(self, passage: int, member: int, detail: Detail) -> Any:
        number, key = passage // SHARD, self._keys[member]
        if (number, member, detail) not in self._files:
            own = self._passages[number * SHARD : (number + 1) * SHARD]
            folder = folder_of(self._root, self._data, key)
            file = open_shard(folder, number, detail, key, self._data, own)
            if file is None:
                message = f"expert {key.name!r} has not read all of the data in detail {detail.name}: see {folder}"
                raise FailedPrecondition(message)
            self._files[number, member, detail] = file
        return self._files[number, member, detail]


def _log_probs(tape: Tape, masses: Sequence[tuple[Array, Array]]) -> Array:
    return tape.log_probs(np.stack([own for own, _ in masses]), np.stack([roots for _, roots in masses]))
