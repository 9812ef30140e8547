"""`token-swarm doctor`."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm.cores import available_cores
from token_swarm_server.cli import options, session
from token_swarm_server.config.places import default_cache

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

_PACKAGES = ("token-swarm", "torch", "transformers", "grpcio", "protobuf", "numpy", "gguf")
_SHARED_MEMORY = Path("/dev/shm")
_SAME_TEXT = (
    "float32: alone and among others, with drafts and without; "
    "bfloat16, float16: up to rounding, which depends on the batch"
)


def doctor(
    cache: options.Cache = None,
    address: Annotated[
        str | None, typer.Option(help="Of a running server: say where the memory of its experts is as well.")
    ] = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    as_json: options.Json = False,
) -> None:
    """Say what this machine offers, and what the experts of a server hold.

    Versions, processor, kernels, demo experts, shared memory. With --address the memory of each expert: its weights,
    the KV that is in use, and the rest of its process, which is its tokenizer, the libraries and what a step needs.

    \b
    Examples:
      token-swarm doctor --json
      token-swarm doctor --address 127.0.0.1:50061
    """
    findings = {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **_processor(),
        "kernels": _kernels(),
        "same text": _SAME_TEXT,
        "shared memory": _shared_memory(),
        "cache": str(cache or default_cache()),
        **_demo_experts(cache or default_cache()),
    }
    if address is not None:
        credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
        findings |= session.with_server(address, None, _memory, credentials)
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


async def _memory(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> dict[str, str]:
    from token_swarm.v1 import swarm_pb2

    answer: Any = await stub.GetStatus(swarm_pb2.GetStatusRequest())
    return {f"memory of {each.expert}": memory_line(each) for each in answer.experts}


def memory_line(expert: swarm_pb2.ExpertStatus) -> str:
    """Where the memory of an expert is, in MB; a backend that does not say how much it holds is named as such."""
    if "weight_bytes" not in expert.engine:
        return "its backend does not say"
    weights, kv, resident = (expert.engine[name] / 1e6 for name in ("weight_bytes", "kv_bytes", "resident_bytes"))
    return (
        f"{resident:,.0f} MB: weights {weights:,.0f}, KV of {expert.kv_tokens:,} tokens {kv:,.0f}, "
        f"tokenizer, libraries and buffers {max(0.0, resident - weights - kv):,.0f}"
    )


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
