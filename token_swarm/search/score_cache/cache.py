"""The score cache: every expert reads the data once, and any particle is then scored without a model.

What is mixed byte by byte (DESIGN 3) is exact from the experts' own next-byte laws: the experts of a cache are
independent of one another, and one more is added without reading the data again with the others. That covers experts
that are alone in their group, at temperature 1. Experts that share a vocabulary mix token by token, and a temperature
reshapes tokens; byte laws carry neither. Such a particle needs a cache of more detail (`needed_detail` says which), and
is refused by name where that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from token_swarm import kernels
from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.particle import Mixture, Rule
from token_swarm.search.score_cache.files import (
    ROWS_LIMIT,
    SHARD,
    ExpertKey,
    complete,
    fill,
    filled,
    folder_of,
    left_out_of,
    model_identity,
    open_shard,
    passages_hash,
)
from token_swarm.search.score_cache.group_laws import GroupLaws, ShardFiles
from token_swarm.search.score_cache.reader import Detail, Passage
from token_swarm.search.score_cache.token_scores import Need, TokenScores, needed_detail
from token_swarm.search.utility import Array, as_items

__all__ = [
    "ROWS_LIMIT",
    "SHARD",
    "Detail",
    "ExpertKey",
    "Passage",
    "ScoreCache",
    "fill",
    "filled",
    "model_identity",
    "passages_hash",
]


class ScoreCache:
    """The laws of several experts on the same passages. Its files are mapped into memory, not read.

    Can be pickled: a process that receives it maps the files itself.
    """

    def __init__(self, root: Path, keys: Sequence[ExpertKey], passages: Sequence[Passage]) -> None:
        """Raises BadParameter for keys without sense, FailedPrecondition where an expert has not read everything."""
        if not keys or len({key.name for key in keys}) < len(keys):
            raise BadParameter("experts", [key.name for key in keys], "at least one, each name once")
        if not passages:
            raise BadParameter("passages", [], "at least one passage")
        self.root, self.keys, self.passages = root.absolute(), tuple(keys), tuple(passages)
        self.data_hash = passages_hash(passages)
        self._shards: dict[int, list[Any]] = {}
        self._held: dict[tuple[ExpertKey, Detail], bool] = {}
        for number, _ in enumerate(range(0, len(passages), SHARD)):
            self._shard(number)

    def __reduce__(self) -> tuple[Any, ...]:
        """Its files are opened again."""
        return ScoreCache, (self.root, self.keys, self.passages)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of every tensor."""
        return tuple(key.name for key in self.keys)

    @cached_property
    def left_out(self) -> dict[int, tuple[str, str]]:
        """Passages that cannot be scored, because some expert cannot read them: (expert, reason) of the first one."""
        found: dict[int, tuple[str, str]] = {}
        for number in range(self._count):
            for key, file in zip(self.keys, self._shard(number), strict=True):
                for index, reason in left_out_of(file).items():
                    found.setdefault(number * SHARD + index, (key.name, reason))
        return dict(sorted(found.items()))

    @cached_property
    def sizes(self) -> Array:
        """Bytes of each passage, float64 [passages]."""
        return np.asarray([passage.size for passage in self.passages], dtype=np.float64)

    def token_log_probs(self) -> Array:
        """Each expert's ordinary token-level figure, nats: float64 [experts, passages]."""
        columns = [[file.get_tensor("token_log_probs") for file in self._shard(i)] for i in range(self._count)]
        return torch.cat([torch.stack(column) for column in columns], dim=1).numpy()

    def offsets(self, passages: Sequence[int] | None = None) -> Tensor:
        """Where each passage starts in `masses` and `log_probs`: int64 [passages + 1]."""
        sizes = self.sizes[as_items(passages, len(self.passages))].astype(np.int64)
        return torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))))

    def masses(self, passages: Sequence[int] | None = None) -> Tensor:
        """What each expert gave the bytes that were there: float64 [experts, positions]."""
        return torch.cat([self._masses[i] for i in as_items(passages, len(self.passages)).tolist()], dim=1)

    def targets(self, passages: Sequence[int] | None = None) -> Tensor:
        """The bytes that were there: int64 [positions]."""
        chosen = as_items(passages, len(self.passages)).tolist()
        text = b"".join(self.passages[i].text.encode() for i in chosen)
        return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))

    def log_probs(self, passages: Sequence[int] | None = None) -> Tensor:
        """The whole laws, copied into memory: float32 [positions, experts, 257], -inf where 0."""
        return torch.cat([laws for _, laws in self._laws(as_items(passages, len(self.passages)).tolist())])

    def score(self, mixtures: Sequence[Mixture], passages: Sequence[int] | None = None) -> Array:
        """Log-probabilities of `passages` under each mixture, nats: float64 [mixtures, passages].

        Raises UnknownName and BadParameter for a mixture that cannot be scored from here.
        """
        chosen = as_items(passages, len(self.passages)).tolist()
        for index in self.left_out.keys() & set(chosen):
            expert, reason = self.left_out[index]
            raise BadParameter("passages", index, f"one that every expert could read; {expert} could not: {reason}")
        needs = [self.need(mixture) for mixture in mixtures]
        scores = np.empty((len(mixtures), len(chosen)))
        for i, mixture in enumerate(mixtures) if chosen else ():
            if needs[i].across:
                scores[i] = self._groups.score(mixture, chosen)
        for rule, by_bytes in product(dict.fromkeys(own.rule for own in mixtures), (True, False)) if chosen else ():
            rows = [
                i
                for i, own in enumerate(mixtures)
                if own.rule is rule and not needs[i].across and (needs[i].detail is Detail.BYTES) == by_bytes
            ]
            if not rows:
                continue
            own = [mixtures[i] for i in rows]
            if not by_bytes:
                scores[rows] = self._tokens.score(own, chosen)
                continue
            weights = torch.tensor([self._weights(mixture) for mixture in own], dtype=torch.float64)
            if rule is Rule.LINEAR:
                scores[rows] = self._score_linear(weights, chosen).numpy()
            else:
                scores[rows] = self._score_laws(weights, chosen, rule).numpy()
        return scores

    @property
    def bytewise(self) -> bool:
        """Whether every expert is alone in its group, so that `masses` and `log_probs` say all of a mixture's law."""
        return len({key.group for key in self.keys}) == len(self.keys)

    def need(self, mixture: Mixture) -> Need:
        """What scoring the mixture takes. Raises UnknownName, and BadParameter when it is not here."""
        mixture.require_known(dict.fromkeys(self.experts))
        need = needed_detail(self.keys, mixture)
        lacking = [key.name for key in self.keys if not self._holds(key, need.details.get(key.name, Detail.BYTES))]
        if lacking:
            mend = f"fill the cache of {', '.join(lacking)} with Detail.{need.detail.name} to score it"
            raise BadParameter(need.field, need.value, f"{need.why}, which cached bytes do not carry; {mend}")
        return need

    def _holds(self, key: ExpertKey, detail: Detail) -> bool:
        if detail is Detail.BYTES:
            return True
        if (key, detail) not in self._held:
            self._held[key, detail] = complete(folder_of(self.root, self.data_hash, key), self._count, detail)
        return self._held[key, detail]

    @cached_property
    def _tokens(self) -> TokenScores:
        return TokenScores(self._stored, self.masses)

    @cached_property
    def _groups(self) -> GroupLaws:
        return GroupLaws(self._stored, self.log_probs)

    @cached_property
    def _stored(self) -> ShardFiles:
        return ShardFiles(self.root, self.data_hash, self.keys, self.passages)

    def _weights(self, mixture: Mixture) -> list[float]:
        """The mixture as a row of the kernels' weights."""
        active = mixture.active
        total = sum(active.values()) if mixture.rule.normalised else 1.0
        return [active.get(name, 0.0) / total for name in self.experts]

    def _score_linear(self, weights: Tensor, chosen: list[int]) -> Tensor:
        masses, offsets = self.masses(chosen), self.offsets(chosen)
        # One by one: a matrix product rounds a row by how many others it has, and a particle's score must not depend on
        # its company, or evaluators would differ in the last digits.
        return torch.cat([kernels.score_linear(masses, row[None], offsets) for row in weights])

    def _score_laws(self, weights: Tensor, chosen: list[int], rule: Rule) -> Tensor:
        pieces = []
        for own, laws in self._laws(chosen):
            pieces.append(kernels.score_byte_laws(laws, self.targets(own), weights, self.offsets(own), rule))
        return torch.cat(pieces, dim=1)

    def _laws(self, chosen: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Runs of chosen passages that lie in one file, and their laws [positions, experts, 257]."""
        for number, group in groupby(chosen, key=lambda passage: passage // SHARD):
            own = list(group)
            first = number * SHARD
            bounds = self.offsets(range(first, min(first + SHARD, len(self.passages)))).tolist()
            stored = [file.get_tensor("log_probs") for file in self._shard(number)]
            if len(own) == len(bounds) - 1 and own == list(range(first, first + len(own))):
                yield own, torch.stack(stored, dim=1)
                continue
            spans = [(bounds[passage - first], bounds[passage - first + 1]) for passage in own]
            yield own, torch.stack([torch.cat([laws[low:high] for low, high in spans]) for laws in stored], dim=1)

    @cached_property
    def _masses(self) -> list[Tensor]:
        """Per passage [experts, bytes]."""
        pieces: list[Tensor] = []
        for number in range(self._count):
            together = torch.stack([file.get_tensor("masses") for file in self._shard(number)])
            start = number * SHARD
            sizes = self.sizes[start : start + SHARD].astype(int).tolist()
            pieces.extend(torch.split(together, sizes, dim=1))
        return pieces

    @property
    def _count(self) -> int:
        return -(-len(self.passages) // SHARD)

    def _shard(self, number: int) -> list[Any]:
        """The file of each expert that holds passages number * SHARD and on."""
        if number not in self._shards:
            own = self.passages[number * SHARD : (number + 1) * SHARD]
            files = []
            for key in self.keys:
                folder = folder_of(self.root, self.data_hash, key)
                file = open_shard(folder, number, Detail.BYTES, key, self.data_hash, own)
                if file is None:
                    message = (
                        f"expert {key.name!r} has not read all of the data: file {number} in {folder} is not there"
                    )
                    raise FailedPrecondition(message)
                files.append(file)
            self._shards[number] = files
        return self._shards[number]
