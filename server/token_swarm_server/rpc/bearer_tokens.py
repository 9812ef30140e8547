"""The file of bearer tokens: who may call, without anything in it that would let its reader call."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from token_swarm.errors import BadParameter, UnknownName
from token_swarm.files import replacing

logger = logging.getLogger(__name__)

SCHEMA = 1
PREFIX = "tsw_"
"""What every token starts with, so that scanners for leaked secrets can know one."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_NAME_ALLOWED = "1 to 64 of a-z, 0-9, _, . and -, starting with a letter or digit"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredToken:
    """One entry of the file. `sha256`: of the token, in hexadecimal; `created`: ISO 8601, UTC."""

    name: str
    sha256: str
    created: str


def digest(token: str) -> str:
    """What is stored of a token.

    One SHA-256 is enough: a token has 256 random bits, which no search can go through. A slow hash, as passwords
    need, would only give strangers a way to keep the server busy.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_tokens(path: Path, field: str = "tokens") -> dict[str, StoredToken]:
    """The entries by name. `field`: what the path is called in errors.

    Raises BadParameter for a file that cannot be read or is something else, and for one that others may write: they
    could let themselves in.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except OSError as error:
        raise BadParameter(field, str(path), f"a file that `token-swarm tokens` wrote ({error.strerror})") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BadParameter(field, f"{path} with mode {mode & 0o777:04o}", "writable by its owner alone: chmod 600")
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}")
        entries = [StoredToken(**entry) for entry in document["tokens"]]
        if not all(_NAME.fullmatch(each.name) and _DIGEST.fullmatch(each.sha256) for each in entries):
            raise ValueError("a name or digest")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadParameter(field, str(path), "a file that `token-swarm tokens` wrote; this one is not") from error
    return {each.name: each for each in entries}


def create_token(path: Path, name: str) -> str:
    """Add a token called `name` to the file, which is made where there is none; the token itself is kept nowhere.

    Raises BadParameter for a bad name or file and a name that is there already, OSError if the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise BadParameter("NAME", name, _NAME_ALLOWED)
    token = PREFIX + secrets.token_urlsafe(32)
    with _locked(path):
        entries = read_tokens(path) if path.exists() else {}
        if name in entries:
            raise BadParameter("NAME", name, "a name that no token of the file has; revoke that one first")
        entries[name] = StoredToken(name, digest(token), datetime.now(UTC).isoformat(timespec="seconds"))
        _write(path, entries)
    return token


def revoke_token(path: Path, name: str) -> None:
    """Take the token called `name` out. Raises UnknownName, BadParameter for a bad file, OSError as writing does."""
    with _locked(path):
        entries = read_tokens(path)
        if name not in entries:
            raise UnknownName("token", name, entries)
        del entries[name]
        _write(path, entries)


def _write(path: Path, entries: Mapping[str, StoredToken]) -> None:
    document = {"schema": SCHEMA, "tokens": [asdict(each) for each in entries.values()]}
    with replacing(path, mode=0o600) as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands at a time would lose one's token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


class TokenStore:
    """The tokens that a server takes. Follows its file: what is revoked there is refused from the next call on."""

    def __init__(self, path: Path, field: str) -> None:
        """`field`: what the path is called in errors. Raises BadParameter as `read_tokens` does, and for no tokens."""
        self._path = path
        self._field = field
        self._stamp = self._now()
        self._digests: tuple[bytes, ...] = self._read()
        if not self._digests:
            raise BadParameter(field, str(path), "a file with a token in it: token-swarm tokens create")

    def reload(self) -> None:
        """Read the file again. One that is gone or broken lets nobody in until it is mended; the log says so."""
        self._stamp = self._now()
        try:
            self._digests = self._read()
            logger.info("%s: %d tokens", self._path, len(self._digests))
        except BadParameter as error:
            self._digests = ()
            logger.error("no token is valid until this is mended: %s", error)

    def accepts(self, token: str) -> bool:
        """Whether `token` is one of them."""
        if self._now() != self._stamp:
            self.reload()
        presented = digest(token).encode()
        found = False
        for stored in self._digests:
            # Every one of them, and each to its end: the time says neither which one it was nor how near.
            found |= hmac.compare_digest(stored, presented)
        return found

    def _read(self) -> tuple[bytes, ...]:
        return tuple(each.sha256.encode() for each in read_tokens(self._path, self._field).values())

    def _now(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_mtime_ns, found.st_size)
