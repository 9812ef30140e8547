"""The files of the score cache: what each expert said of each passage, and how they come to be.

    <root>/<data>/<expert>/00000.safetensors          byte laws of the first passages (Detail.BYTES)
                           00000.masses.safetensors   their tapes and token masses (Detail.MASSES)
                           00000.rows.safetensors     their logit rows (Detail.ROWS)
                           expert.json                the expert; written last

A file is written whole, carries the fingerprints of expert and data, and is made anew when it is not what it should be.
It also says which passages the expert cannot read, and why: they stand in it with probability 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from token_swarm.decoding.score import CanonicalPath
from token_swarm.errors import BadParameter
from token_swarm.experts.contract import EncodedPrompt, Expert, ExpertSpec
from token_swarm.files import replacing
from token_swarm.mixing.byte_law import SYMBOLS
from token_swarm.search.score_cache.reader import Detail, LawReader, LeftOut, Passage, PassageLaws
from token_swarm.search.score_cache.tape import Tape

logger = logging.getLogger(__name__)

FORMAT = "2"
ROWS_LIMIT = 4 * 2**30
"""Most bytes of one expert's logit rows."""
VOCABULARY = "vocabulary"
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
    detail: Detail = Detail.BYTES,
    tries: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    rows_limit: int = ROWS_LIMIT,
) -> ExpertKey:
    """Read `passages` with `expert` into the cache below `root`; what is there already is not read again.

    source: see `ExpertKey`; detail: how much is kept; tries: folder in which the vocabulary's trie is kept; progress:
    called with the passages done and all of them; rows_limit: most bytes of logit rows. A passage that the expert
    cannot read is left out: `ScoreCache.left_out` says which, and why.
    Raises BadParameter when there would be more rows, or when no passage is left, what `LawReader.read` raises, and
    OSError as writing does; every finished file stays.
    """
    key, data = ExpertKey.of(expert.spec, source), passages_hash(passages)
    folder = folder_of(root, data, key)
    reader = LawReader(expert, tries, detail)
    if detail is Detail.ROWS:
        needed = reader.row_bytes(passages)
        if needed > rows_limit:
            allowed = (
                f"at most {rows_limit / 1e9:.2f} GB, the limit: give fewer or shorter examples, or raise it "
                "(--rows-limit); with the linear rule and without temperatures no rows are kept"
            )
            raise BadParameter(f"logit rows of {key.name}", f"{needed / 1e9:.2f} GB", allowed)
        with replacing(folder / VOCABULARY) as file:
            file.write(expert.spec.vocabulary.to_bytes())
    left_out: dict[int, str] = {}
    for number, start in enumerate(range(0, len(passages), SHARD)):
        own = passages[start : start + SHARD]
        wanted = [level for level in Detail if level <= detail]
        found = {level: open_shard(folder, number, level, key, data, own) for level in wanted}
        shorter = found[Detail.BYTES] is not None and _context_of(found[Detail.BYTES]) < expert.spec.max_context
        missing = [level for level in wanted if found[level] is None or shorter]
        if missing:
            read = []
            for passage in reader.read(own):
                read.append(passage)
                if progress is not None:
                    progress(start + len(read), len(passages))
            metadata = _metadata(key, data) | _left_out_metadata(read, expert.spec.max_context)
            for level in missing:
                with replacing(folder / _file_name(number, level)) as file:
                    file.write(save(_CONTENTS[level](own, read), metadata=metadata))
            left_out.update({start + i: each.reason for i, each in enumerate(read) if isinstance(each, LeftOut)})
        else:
            left_out.update({start + i: reason for i, reason in left_out_of(found[Detail.BYTES]).items()})
            if progress is not None:
                progress(start + len(own), len(passages))
    if len(left_out) == len(passages):
        # The reason may be mended: nothing that says so may stand in the way of another try.
        shutil.rmtree(folder)
        raise BadParameter("passages", f"{len(passages)} of them", f"some that {key.name} can read: {left_out[0]}")
    with replacing(folder / "expert.json") as file:
        # Written last: it says that the byte laws are complete.
        file.write(json.dumps(asdict(key), indent=2).encode() + b"\n")
    return key


def filled(
    root: Path, passages: Sequence[Passage], name: str, source: str, detail: Detail = Detail.BYTES
) -> ExpertKey | None:
    """The key of an expert of that name and source that has read all passages in that detail; None if there is none.

    None also where a passage was too long: only the expert knows whether its context has grown.
    """
    data, count = passages_hash(passages), -(-len(passages) // SHARD)
    for path in sorted((root / data[:16]).glob(f"{name}-*/expert.json")):
        try:
            key = ExpertKey(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            continue
        if (key.name, key.source) != (name, source) or not complete(path.parent, count, detail):
            continue
        shards = (
            open_shard(path.parent, i, Detail.BYTES, key, data, passages[i * SHARD : (i + 1) * SHARD])
            for i in range(count)
        )
        if all(shard is not None and _context_of(shard) == _ANY_CONTEXT for shard in shards):
            return key
    return None


def complete(folder: Path, count: int, detail: Detail) -> bool:
    """Whether all `count` files of every level up to `detail` are there."""
    return all((folder / _file_name(i, level)).is_file() for level in Detail if level <= detail for i in range(count))


def folder_of(root: Path, data: str, key: ExpertKey) -> Path:
    """Where an expert's files on the data of that hash are."""
    return root / data[:16] / f"{key.name}-{key.fingerprint[:16]}"


def open_shard(
    folder: Path, number: int, detail: Detail, key: ExpertKey, data: str, passages: Sequence[Passage]
) -> Any | None:
    """The mapped file that holds `passages`, or None when it is missing, damaged or of something else."""
    path = folder / _file_name(number, detail)
    try:
        file: Any = safe_open(path, framework="pt")
        if not _metadata(key, data).items() <= (file.metadata() or {}).items():
            return None
        sizes = file.get_tensor("sizes").tolist()
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s) and is made anew", path, error)
        return None
    return file if sizes == [passage.size for passage in passages] else None


def stored_tape(file: Any, index: int) -> Tape:
    """The tape of passage `index` of a masses file."""
    return Tape(**{f.name: file.get_tensor(f"{index}.{f.name}").numpy() for f in fields(Tape)})


def _file_name(number: int, detail: Detail) -> str:
    kind = "" if detail is Detail.BYTES else f".{detail.name.lower()}"
    return f"{number:05}{kind}.safetensors"


def _metadata(key: ExpertKey, data: str) -> dict[str, str]:
    return {"format": FORMAT, "expert": key.fingerprint, "data": data}


_ANY_CONTEXT = 2**62
"""Stands for the context of a file whose passages all fitted."""


def left_out_of(file: Any) -> dict[int, str]:
    """Which passages of a file the expert cannot read, by their number in the file, and why."""
    reasons: dict[str, str] = json.loads(file.metadata().get("left_out", "{}"))
    return {int(index): reason for index, reason in reasons.items()}


def _left_out_metadata(read: Sequence[PassageLaws | LeftOut], max_context: int) -> dict[str, str]:
    reasons = {index: own.reason for index, own in enumerate(read) if isinstance(own, LeftOut)}
    if not reasons:
        return {}
    too_long = any(isinstance(own, LeftOut) and own.too_long for own in read)
    return {"left_out": json.dumps(reasons), "context": str(max_context if too_long else _ANY_CONTEXT)}


def _context_of(file: Any) -> int:
    """The context in tokens for which a passage of the file was too long; more than any if all fitted."""
    return int(file.metadata().get("context", _ANY_CONTEXT))


def _sizes(passages: Sequence[Passage]) -> dict[str, Tensor]:
    return {"sizes": torch.tensor([passage.size for passage in passages])}


def _byte_laws(passages: Sequence[Passage], read: Sequence[PassageLaws | LeftOut]) -> dict[str, Tensor]:
    """Positions are the bytes of the passages one after another.

    log_probs float32 [positions, 257] (float16 would round a law by up to 4e-3 nats); masses float64 [positions];
    targets uint8 [positions]; sizes int64 [passages]; token_log_probs float64 [passages].
    """
    law = np.concatenate(
        [
            np.zeros((passage.size, SYMBOLS)) if isinstance(own, LeftOut) else own.laws
            for passage, own in zip(passages, read, strict=True)
        ]
    )
    token_log_probs = [-np.inf if isinstance(own, LeftOut) else own.token_log_prob for own in read]
    target = np.concatenate([np.frombuffer(passage.text.encode(), dtype=np.uint8) for passage in passages])
    with np.errstate(divide="ignore"):
        log_probs = np.log(law).astype(np.float32)
    return {
        **_sizes(passages),
        "log_probs": torch.from_numpy(log_probs),
        "masses": torch.from_numpy(law[np.arange(target.size), target]),
        "targets": torch.from_numpy(target),
        "token_log_probs": torch.tensor(token_log_probs, dtype=torch.float64),
    }


def _token_masses(passages: Sequence[Passage], read: Sequence[PassageLaws | LeftOut]) -> dict[str, Tensor]:
    """Per passage i its tape (`i.targets` and so on), `i.masses` and `i.roots`."""
    tensors = _sizes(passages)
    for index, own in enumerate(read):
        if isinstance(own, LeftOut):
            continue
        assert own.tape is not None
        assert own.masses is not None
        assert own.roots is not None
        arrays = {f.name: getattr(own.tape, f.name) for f in fields(Tape)} | {"masses": own.masses, "roots": own.roots}
        tensors.update({f"{index}.{name}": torch.from_numpy(array) for name, array in arrays.items()})
    return tensors


def _logit_rows(passages: Sequence[Passage], read: Sequence[PassageLaws | LeftOut]) -> dict[str, Tensor]:
    """Per passage i `i.rows` [rows, width], in the expert's dtype, and the way that they go along (`stored_path`)."""
    tensors = _sizes(passages)
    for index, own in enumerate(read):
        if isinstance(own, LeftOut) or own.rows is None or own.path is None:
            continue
        tensors[f"{index}.rows"] = own.rows
        tensors[f"{index}.tokens"] = torch.tensor(own.path.tokens)
        tensors[f"{index}.prompt"] = torch.tensor(own.path.prompt.tokens)
        tensors[f"{index}.lengths"] = torch.tensor([len(own.path.context), own.path.prompt.tail])
    return tensors


def stored_path(file: Any, index: int) -> CanonicalPath:
    """The way of passage `index` of a file of logit rows."""
    tokens, prompt, lengths = (
        tuple(file.get_tensor(f"{index}.{name}").tolist()) for name in ("tokens", "prompt", "lengths")
    )
    return CanonicalPath(prompt[: lengths[0]], tokens, EncodedPrompt(prompt, lengths[1]))


_CONTENTS = {Detail.BYTES: _byte_laws, Detail.MASSES: _token_masses, Detail.ROWS: _logit_rows}
