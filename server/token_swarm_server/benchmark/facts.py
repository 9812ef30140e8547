"""What a figure depends on: the machine, the versions, the revision of the code and the experts."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from token_swarm.cores import available_cores
from token_swarm.v1 import swarm_pb2
from token_swarm_server.config.settings import Settings

_PACKAGES = ("token-swarm", "torch", "transformers", "grpcio", "protobuf", "numpy")


def machine_facts() -> dict[str, Any]:
    """Processor, memory, versions and git revision, for JSON."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(available_cores()),
        "memory_gb": _memory_gb(),
        "vector_instructions": _vector_instructions(),
        "gpus": _gpus(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "kernels": _kernels(),
        "git_revision": git_revision(),
    }


def expert_facts(experts: Iterable[swarm_pb2.ExpertInfo]) -> dict[str, dict[str, Any]]:
    """What a server says of its experts."""
    return {
        each.name: {
            "architecture": each.architecture,
            "vocabulary": each.vocabulary_size,
            "dtype": each.dtype,
            "max_context": each.max_context,
            "group": each.group,
        }
        for each in experts
    }


def describe(facts: Mapping[str, Any]) -> str:
    """One line for people, to stand beside every table."""
    versions = facts["versions"]
    gpus = f", {', '.join(facts['gpus'])}" if facts["gpus"] else ", no GPU"
    return (
        f"{facts['processor']}, {facts['cores']} cores ({facts['vector_instructions']}), "
        f"{facts['memory_gb']} GB{gpus}; Python {facts['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, grpcio {versions['grpcio']}; "
        f"revision {facts['git_revision']}; {facts['date']}"
    )


def git_revision() -> str:
    """Short revision of the checkout this code is in, with `+` when files differ from it; `unknown` outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "--short=10", "HEAD")
        return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    except (ValueError, OSError):
        return None


def _vector_instructions() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _kernels() -> dict[str, str]:
    from token_swarm import kernels

    return dict(kernels.describe())


def config_facts(settings: Settings) -> dict[str, Any]:
    """The configuration that a server of our own was started with; no addresses, tokens or keys."""
    keys = ("model", "backend", "device", "dtype", "threads", "max_sequences", "max_context")
    coordinator = ("rule", "weights", "epsilon", "window", "lanes_per_expert", "draft_tokens", "draft_rows")
    return {
        "experts": {name: {key: getattr(expert, key) for key in keys} for name, expert in settings.experts.items()},
        "coordinator": {key: getattr(settings.coordinator, key) for key in coordinator},
        "pin_cores": settings.pin_cores,
    }
