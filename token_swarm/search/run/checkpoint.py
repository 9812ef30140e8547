"""What a search writes down after every iteration, and the check that it goes on with what it began with."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from token_swarm.errors import BadParameter, FailedPrecondition
from token_swarm.files import replacing
from token_swarm.search.optimisers.base import State

FORMAT = 1


class CheckpointMismatch(FailedPrecondition):
    """A checkpoint that was made by another search than the one that wants to go on with it."""

    def __init__(self, path: Path, differences: list[str]) -> None:
        super().__init__(
            f"{path} is of another search: {'; '.join(differences)}. Give what it was made with, or another folder"
        )
        self.differences = differences


@dataclass(frozen=True)
class Identity:
    """What must be the same for a search to go on.

    experts: name -> fingerprint of all that decides its laws; data_hash: of the examples in their order;
    config: JSON values, everything else that was asked for.
    """

    experts: Mapping[str, str]
    data_hash: str
    config: Mapping[str, Any]

    def differences(self, other: Identity) -> list[str]:
        """In words, what `other` (now) has that differs from this (then); the cause before what follows from it."""
        found = []
        for name in sorted(self.experts.keys() | other.experts.keys()):
            then, now = self.experts.get(name), other.experts.get(name)
            if then is None or now is None:
                found.append(f"expert {name!r} is {'new' if then is None else 'missing'}")
            elif then != now:
                found.append(f"expert {name!r} had fingerprint {then[:12]}, now {now[:12]}")
        if self.data_hash != other.data_hash:
            found.append(f"the data had hash {self.data_hash[:12]}, now {other.data_hash[:12]}")
        for key in sorted(self.config.keys() | other.config.keys()):
            before, after = self.config.get(key), other.config.get(key)
            if before != after:
                found.append(f"{key} was {before!r}, now {after!r}")
        return found


@dataclass(frozen=True)
class Checkpoint:
    """The search after `iteration` told batches.

    evaluations: particles judged; examples: particles x examples judged; seconds: spent until here; history_bytes: how
    much of the history file belongs to it; failures: particles that failed so far; optimiser: its state.
    """

    identity: Identity
    iteration: int
    evaluations: int
    examples: int
    seconds: float
    history_bytes: int
    optimiser: State = field(repr=False)
    failures: int = 0

    def save(self, path: Path) -> None:
        """Write it so that `path` is this one or the one before it, whatever happens. Raises OSError."""
        document = {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        document["identity"] = asdict(self.identity)
        with replacing(path) as file:
            file.write(json.dumps(_encode(document)).encode())

    @classmethod
    def load(cls, path: Path, identity: Identity) -> Checkpoint | None:
        """The checkpoint at `path`, None when there is none.

        Raises CheckpointMismatch when it belongs to another search than `identity`, BadParameter when it is no
        checkpoint, OSError when it cannot be read.
        """
        try:
            document = _decode(json.loads(path.read_text(encoding="utf-8")))
            if document.pop("format") != FORMAT:
                raise BadParameter(f"{path}: format", "another", f"{FORMAT}, which this version writes")
            checkpoint = cls(**{**document, "identity": Identity(**document["identity"])})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            if isinstance(error, BadParameter):
                raise
            raise BadParameter(str(path), f"{type(error).__name__}: {error}", "a checkpoint of a search") from error
        # As JSON knows it: a tuple of the configuration comes back as a list.
        differences = checkpoint.identity.differences(_as_read(identity))
        if differences:
            raise CheckpointMismatch(path, differences)
        return checkpoint


def _as_read(identity: Identity) -> Identity:
    return Identity(**json.loads(json.dumps(asdict(identity))))


def _encode(value: Any) -> Any:
    """JSON values, with arrays as their bytes: no digit is lost."""
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": value.dtype.str, "shape": list(value.shape), "data": data}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _encode(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(each) for each in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"array", "shape", "data"}:
            flat = np.frombuffer(base64.b64decode(value["data"], validate=True), dtype=np.dtype(value["array"]))
            return flat.reshape(value["shape"]).copy()
        return {key: _decode(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_decode(each) for each in value]
    return value
