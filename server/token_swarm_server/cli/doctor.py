"""`token-swarm doctor`."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from token_swarm_server.cli import options
from token_swarm_server.config.cores import available_cores
from token_swarm_server.config.places import default_cache

_PACKAGES = ("token-swarm", "torch", "transformers", "grpcio", "protobuf", "numpy", "gguf")
_SHARED_MEMORY = Path("/dev/shm")


def doctor(
    cache: options.Cache = None,
    as_json: options.Json = False,
) -> None:
    """Say what this machine offers.

    Versions, processor, kernels, demo experts, shared memory.

    \b
    Example:
      token-swarm doctor --json
    """
    findings = {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **_processor(),
        "kernels": _kernels(),
        "shared memory": _shared_memory(),
        "cache": str(cache or default_cache()),
        **_demo_experts(cache or default_cache()),
    }
    if as_json:
        print(json.dumps(findings))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, finding in findings.items():
        table.add_row(name, str(finding))
    Console().print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> dict[str, Any]:
    import torch

    return {
        "cores": len(available_cores()),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "native bfloat16": bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
        "cuda devices": torch.cuda.device_count(),
    }


def _kernels() -> str:
    from token_swarm import kernels

    return ", ".join(f"{device}: {name}" for device, name in kernels.describe().items())


def _shared_memory() -> str:
    from token_swarm_server.expert_protocol.shared_memory import shared_memory_identity

    if shared_memory_identity(_SHARED_MEMORY) is None:
        return f"none at {_SHARED_MEMORY}: logits travel inside messages"
    return f"{_SHARED_MEMORY}, {shutil.disk_usage(_SHARED_MEMORY).free / 1e6:,.0f} MB free"


def _demo_experts(cache: Path) -> dict[str, str]:
    from token_swarm_server.assets.demo_experts import STAMP
    from token_swarm_server.assets.demo_table import DEMO_EXPERTS

    return {
        f"demo:{expert.name}": str(cache / "experts" / expert.name)
        if (cache / "experts" / expert.name / STAMP).exists()
        else "not fetched yet: fetched when a command names it"
        for expert in DEMO_EXPERTS
    }
