"""The score cache: every expert reads the data once, and any particle is then scored without a model.

A file holds some passages' next-byte laws under one expert, at its own temperature and on its own: the experts of a
cache are independent of one another, and one more is added without reading the data again with the others. What is
mixed byte by byte (DESIGN 3) is exact from there: experts that are alone in their group. Experts that share a
vocabulary mix token by token inside their group, and a temperature reshapes tokens; bytes do not carry either, and
such a particle is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from token_swarm import kernels
from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.experts.contract import Expert, ExpertSpec
from token_swarm.files import replacing
from token_swarm.particle import Mixture, Rule
from token_swarm.search.scoring import LawReader, Passage
from token_swarm.search.utility import Array, as_items

logger = logging.getLogger(__name__)

FORMAT = "1"
SHARD = 16
"""Passages of one file: what is lost when filling is interrupted, and what is held in memory while scoring."""


@dataclass(frozen=True)
class ExpertKey:
    """What decides an expert's laws. `source` tells models of one architecture apart: see `model_identity`."""

    name: str
    architecture: str
    vocabulary: str
    canonical: str
    dtype: str
    source: str = ""

    @classmethod
    def of(cls, spec: ExpertSpec, source: str = "") -> ExpertKey:
        """The key of a running expert."""
        return cls(spec.name, spec.architecture, spec.vocabulary.fingerprint, spec.canonical, str(spec.dtype), source)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def group(self) -> tuple[str, str]:
        """Experts with the same value form one group (DESIGN 3)."""
        return self.vocabulary, self.canonical


def model_identity(model: str) -> str:
    """A digest that changes with the model: of a directory's files, or of a hub id as it stands.

    Small files count whole; of a larger one its size and its first and last MiB, so that it takes milliseconds.
    """
    directory = Path(model)
    if not directory.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(entry for entry in directory.iterdir() if entry.is_file() and not entry.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            if size > 2**20:
                file.seek(max(size - 2**20, 2**20))
                digest.update(file.read())
    return digest.hexdigest()


def passages_hash(passages: Sequence[Passage]) -> str:
    """SHA-256 (hex) of the passages in order."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(json.dumps(asdict(passage), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def fill(
    root: Path,
    expert: Expert,
    passages: Sequence[Passage],
    *,
    source: str = "",
    tries: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertKey:
    """Read `passages` with `expert` into the cache below `root`; what is there already is not read again.

    source: see `ExpertKey`; tries: folder in which the vocabulary's trie is kept; progress: called with the passages
    done and all of them. Raises what `LawReader.read` raises, and OSError as writing does; every finished file stays.
    """
    key, data = ExpertKey.of(expert.spec, source), passages_hash(passages)
    folder = _folder(root, data, key)
    reader = LawReader(expert, tries)
    for number, start in enumerate(range(0, len(passages), SHARD)):
        own = passages[start : start + SHARD]
        path = folder / _file_name(number)
        if _open_shard(path, key, data, own) is None:
            tensors = _read(reader, own)
            with replacing(path) as file:
                file.write(save(tensors, metadata=_metadata(key, data)))
        if progress is not None:
            progress(min(start + SHARD, len(passages)), len(passages))
    with replacing(folder / "expert.json") as file:
        # Written last: it says that the folder is complete.
        file.write(json.dumps(asdict(key), indent=2).encode() + b"\n")
    return key


def filled(root: Path, passages: Sequence[Passage], name: str, source: str) -> ExpertKey | None:
    """The key of an expert of that name and source that has read all passages; None when there is none."""
    for path in sorted((root / passages_hash(passages)[:16]).glob(f"{name}-*/expert.json")):
        try:
            key = ExpertKey(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            continue
        if (key.name, key.source) == (name, source):
            return key
    return None


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
        weights = [self._weights(mixture) for mixture in mixtures]
        scores = np.empty((len(mixtures), len(chosen)))
        for rule in Rule:
            rows = [i for i, mixture in enumerate(mixtures) if mixture.rule is rule]
            if rows and chosen:
                table = torch.tensor([weights[i] for i in rows], dtype=torch.float64)
                score = self._score_linear if rule is Rule.LINEAR else self._score_log_linear
                scores[rows] = score(table, chosen).numpy()
        return scores

    def _weights(self, mixture: Mixture) -> list[float]:
        """The mixture as a row of the kernels' weights."""
        mixture.require_known(dict.fromkeys(self.experts))
        active = mixture.active
        groups = Counter(key.group for key in self.keys if key.name in active)
        shared = [key.name for key in self.keys if key.name in active and groups[key.group] > 1]
        if shared:
            raise BadParameter(
                "weights",
                dict(mixture.weights),
                f"zero for all but one of {', '.join(shared)}: they share a vocabulary and mix token by token, which "
                "cached bytes do not carry",
            )
        for name, temperature in mixture.temperatures.items():
            if temperature != 1 and name in active:
                allowed = "1: a temperature reshapes tokens, which cached bytes do not carry"
                raise BadParameter(f"temperatures[{name}]", temperature, allowed)
        if mixture.rule is Rule.LINEAR:
            total = sum(active.values())
            return [active.get(name, 0.0) / total for name in self.experts]
        if len(active) == 1 and set(active.values()) != {1.0}:
            ((name, weight),) = active.items()
            allowed = "1 for a single expert: its power reshapes tokens, which cached bytes do not carry"
            raise BadParameter(f"weights[{name}]", weight, allowed)
        return [active.get(name, 0.0) for name in self.experts]

    def _score_linear(self, weights: Tensor, chosen: list[int]) -> Tensor:
        masses, offsets = self.masses(chosen), self.offsets(chosen)
        # One by one: a matrix product rounds a row by how many others it has, and a particle's score must not depend on
        # its company, or evaluators would differ in the last digits.
        return torch.cat([kernels.score_linear(masses, row[None], offsets) for row in weights])

    def _score_log_linear(self, weights: Tensor, chosen: list[int]) -> Tensor:
        pieces = []
        for own, laws in self._laws(chosen):
            pieces.append(kernels.score_log_linear(laws, self.targets(own), weights, self.offsets(own)))
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
                path = _folder(self.root, self.data_hash, key) / _file_name(number)
                file = _open_shard(path, key, self.data_hash, own)
                if file is None:
                    raise FailedPrecondition(f"expert {key.name!r} has not read all of the data: {path} is not there")
                files.append(file)
            self._shards[number] = files
        return self._shards[number]


def _folder(root: Path, data: str, key: ExpertKey) -> Path:
    return root / data[:16] / f"{key.name}-{key.fingerprint[:16]}"


def _file_name(number: int) -> str:
    return f"{number:05}.safetensors"


def _metadata(key: ExpertKey, data: str) -> dict[str, str]:
    return {"format": FORMAT, "expert": key.fingerprint, "data": data}


def _read(reader: LawReader, passages: Sequence[Passage]) -> dict[str, Tensor]:
    """What one file holds: positions are the bytes of its passages one after another.

    log_probs float32 [positions, 257] (float16 would round a law by up to 4e-3 nats); masses float64 [positions];
    targets uint8 [positions]; sizes int64 [passages]; token_log_probs float64 [passages].
    """
    laws, targets, token_log_probs = [], [], []
    for passage, read in zip(passages, reader.read(passages), strict=True):
        laws.append(read.laws)
        targets.append(np.frombuffer(passage.text.encode(), dtype=np.uint8))
        token_log_probs.append(read.token_log_prob)
    law, target = np.concatenate(laws), np.concatenate(targets)
    with np.errstate(divide="ignore"):
        log_probs = np.log(law).astype(np.float32)
    return {
        "log_probs": torch.from_numpy(log_probs),
        "masses": torch.from_numpy(law[np.arange(target.size), target]),
        "targets": torch.from_numpy(target.copy()),
        "sizes": torch.tensor([passage.size for passage in passages]),
        "token_log_probs": torch.tensor(token_log_probs, dtype=torch.float64),
    }


def _open_shard(path: Path, key: ExpertKey, data: str, passages: Sequence[Passage]) -> Any | None:
    """The mapped file, or None when it is missing, damaged or of something else."""
    try:
        file: Any = safe_open(path, framework="pt")
        if file.metadata() != _metadata(key, data):
            return None
        sizes = file.get_tensor("sizes").tolist()
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s) and is made anew", path, error)
        return None
    return file if sizes == [passage.size for passage in passages] else None
