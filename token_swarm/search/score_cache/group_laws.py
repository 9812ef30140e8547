"""Byte laws of groups, made anew for every mixture from the members' logit rows.

Under the log-linear rule groups are mixed as products of whole byte laws (DESIGN 3): P(b) ~ prod_g P_g(b)^W_g. The byte
law of a group whose members are mixed by tokens, p_g(t) ~ prod_e p_e(t)^(w_e/W_g), follows from no sums that could be
kept, as every weight changes every token. So the rows are kept, and each mixture goes along the text with them, as the
scorer does with a model: exact, without a forward, and slow beside a particle that is scored from bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.decoding.ensemble import Ensemble
from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.experts.contract import ExpertSpec
from token_swarm.mixing.groups import Group, split_weights
from token_swarm.mixing.trie import ByteTrie
from token_swarm.particle import Mixture
from token_swarm.search.score_cache.files import (
    SHARD,
    VOCABULARY,
    ExpertKey,
    folder_of,
    open_shard,
    stored_path,
)
from token_swarm.search.score_cache.reader import Detail, Passage, follow
from token_swarm.search.utility import Array
from token_swarm.vocabulary import Vocabulary


class ShardFiles:
    """The files of several experts on one list of passages, each opened once."""

    def __init__(self, root: Path, data_hash: str, keys: Sequence[ExpertKey], passages: Sequence[Passage]) -> None:
        self.keys, self.passages = tuple(keys), tuple(passages)
        self._root, self._data = root, data_hash
        self._files: dict[tuple[int, int, Detail], Any] = {}
        self._vocabularies: dict[tuple[str, str], tuple[Vocabulary, ByteTrie]] = {}

    def open(self, passage: int, expert: int, detail: Detail) -> Any:
        """The file that has passage `passage`, as its number `passage % SHARD`. Raises FailedPrecondition."""
        number, key = passage // SHARD, self.keys[expert]
        if (number, expert, detail) not in self._files:
            own = self.passages[number * SHARD : (number + 1) * SHARD]
            folder = folder_of(self._root, self._data, key)
            file = open_shard(folder, number, detail, key, self._data, own)
            if file is None:
                message = f"expert {key.name!r} has not read all of the data in detail {detail.name}: see {folder}"
                raise FailedPrecondition(message)
            self._files[number, expert, detail] = file
        return self._files[number, expert, detail]

    def rows(self, passage: int, expert: int) -> Tensor:
        """Logit rows [rows, width] of a passage."""
        rows: Tensor = self.open(passage, expert, Detail.ROWS).get_tensor(f"{passage % SHARD}.rows")
        return rows

    def vocabulary(self, expert: int) -> tuple[Vocabulary, ByteTrie]:
        """An expert's vocabulary and its trie; those of a group are one."""
        key = self.keys[expert]
        if key.group not in self._vocabularies:
            folder = folder_of(self._root, self._data, key)
            vocabulary = Vocabulary.from_bytes((folder / VOCABULARY).read_bytes())
            self._vocabularies[key.group] = vocabulary, ByteTrie.build(vocabulary)
        return self._vocabularies[key.group]

    def refuse_apart(self, passage: int, experts: Sequence[int]) -> NoReturn:
        """Raise BadParameter: members of one group have to read a passage alike."""
        names = ", ".join(self.keys[expert].name for expert in experts)
        allowed = f"one that {names} read alike: after their prompts, they split it differently"
        raise BadParameter(f"passages[{passage}]", self.passages[passage].text, allowed)


class GroupLaws:
    """Scores mixtures of several groups, some of which are made of rows, under any but the linear rule."""

    def __init__(self, files: ShardFiles, byte_laws: Callable[[Sequence[int]], Tensor]) -> None:
        """byte_laws: passages -> log-laws of the experts alone, [positions, experts, 257]."""
        self._stored, self._byte_laws = files, byte_laws
        self._ensembles: dict[tuple[str, str], Ensemble] = {}

    def score(self, mixture: Mixture, passages: Sequence[int]) -> Array:
        """Log-probabilities, nats: float64 [passages]. Raises BadLogits where a power of rows is no law."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index, key in enumerate(self._stored.keys):
            if key.name in mixture.active:
                groups.setdefault(key.group, []).append(index)
        return np.asarray([self._passage(mixture, list(groups.values()), passage) for passage in passages])

    def _passage(self, mixture: Mixture, groups: Sequence[Sequence[int]], passage: int) -> float:
        text = self._stored.passages[passage].text.encode()
        own, weights, laws = self._byte_laws([passage]), [], []
        for members in groups:
            names = [self._stored.keys[member].name for member in members]
            weight, exponents = split_weights(
                [mixture.active[name] for name in names], mixture.rule, alone=len(groups) == 1
            )
            heats = tuple(mixture.temperatures.get(name, 1.0) for name in names)
            weights.append(weight)
            if exponents == (1.0,) and heats == (1.0,):
                laws.append(own[:, members[0]].double())
                continue
            made = self._group(members, exponents, heats, mixture, passage, text)
            if made is None:
                return -np.inf
            laws.append(made)
        score = kernels.score_byte_laws(
            torch.stack(laws, dim=1).float(),
            torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64)),
            torch.tensor([weights], dtype=torch.float64),
            torch.tensor([0, len(text)]),
            mixture.rule,
        )
        return float(score[0, 0])

    def _group(
        self,
        members: Sequence[int],
        exponents: tuple[float, ...],
        heats: tuple[float, ...],
        mixture: Mixture,
        passage: int,
        text: bytes,
    ) -> Tensor | None:
        """A group's log-laws along the text, [bytes, 257]; None where it excludes a byte that is there."""
        files = [self._stored.open(passage, member, Detail.ROWS) for member in members]
        path, *others = (stored_path(file, passage % SHARD) for file in files)
        if any(other != path for other in others):
            self._stored.refuse_apart(passage, members)
        ensemble = self._ensemble(members)
        specs = tuple(ensemble.specs[self._stored.keys[member].name] for member in members)
        group = Group(specs, exponents, heats, 1.0, mixture.rule)
        rows = [self._stored.rows(passage, member) for member in members]
        laws = follow(ensemble, group, path, text, iter([list(own) for own in zip(*rows, strict=True)]))
        if len(laws) < len(text) or not laws[-1, text[-1]] > 0:
            return None
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(laws))

    def _ensemble(self, members: Sequence[int]) -> Ensemble:
        """The members' common vocabulary, and all experts that have it, as mixing takes them."""
        group = self._stored.keys[members[0]].group
        if group not in self._ensembles:
            vocabulary, trie = self._stored.vocabulary(members[0])
            specs = {
                key.name: ExpertSpec(
                    name=key.name,
                    architecture=key.architecture,
                    vocabulary=vocabulary,
                    canonical=key.canonical,
                    max_context=2**31,
                    max_sequences=1,
                    dtype=getattr(torch, key.dtype.removeprefix("torch.")),
                )
                for key in self._stored.keys
                if key.group == group
            }
            self._ensembles[group] = Ensemble(specs, {vocabulary.fingerprint: trie})
        return self._ensembles[group]
