"""vLLM runs one engine per process at a time: each module makes its own and closes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from token_swarm.experts.vllm.expert import VllmExpert

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed for this interpreter: make vllm, then make test-vllm",
)


@contextmanager
def vllm_expert(directory: Path, **options: Any) -> Iterator[VllmExpert]:
    """An expert on vLLM in float32, closed at the end."""
    from token_swarm.experts.vllm.expert import VllmExpert

    expert = VllmExpert("expert", directory, **{"dtype": "float32", "threads": 1, **options})
    try:
        yield expert
    finally:
        expert.close()
