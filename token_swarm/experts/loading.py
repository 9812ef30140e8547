"""What the loading of every backend needs: the model's source, its tokenizer, a dtype, a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExpertLoadError(ValueError):
    """A model that cannot be loaded, or cannot be served as an expert."""


def require_at_least(field_name: str, value: int, least: int) -> None:
    """Raise ExpertLoadError for an argument that is too small."""
    if value < least:
        raise ExpertLoadError(f"{field_name}: {value} is not allowed, at least {least} is needed")


def load_tokenizer(source: str) -> tuple[Any, Any, Any]:
    """Configuration, generation configuration (None without one) and tokenizer, for a backend with its own weights.

    `source`: what `source_of` says. Raises ExpertLoadError.
    """
    with one_line(source):
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:
        generation = None
    return config, generation, tokenizer


def device_of(device: str) -> torch.device:
    """Parse and check a device. Raises ExpertLoadError."""
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError) as error:
        raise ExpertLoadError(f"device: {device!r} is not available: {str(error).splitlines()[0]}") from error
    return parsed


def context_limit(config: Any) -> int | None:
    """Positions the model knows, None when its configuration does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def source_of(model: str | Path) -> str:
    """What `from_pretrained` is given for a directory or hub id. Raises ExpertLoadError for a missing directory."""
    source = str(Path(model).expanduser()) if isinstance(model, Path) else model
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    # A hub id is "name" or "owner/name"; anything else was meant as a directory.
    if isinstance(model, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ExpertLoadError(f"model: {source} is not a directory")
    return source


def dtype_of(dtype: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Parse a dtype; "auto" is float32 on a CPU and the checkpoint's own elsewhere. Raises ExpertLoadError.

    On every CPU, also one that computes bfloat16 natively: there a step of SmolLM2 takes 19 ms in float32 with our
    kernels, which read weights as bfloat16 where that is exact, and 43 ms in bfloat16.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise ExpertLoadError(f"dtype: {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


@contextmanager
def one_line(source: str) -> Iterator[None]:
    """Turn what transformers raises while it loads `source` into an ExpertLoadError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ExpertLoadError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ExpertLoadError(f"model: {source} cannot be loaded as a causal language model: {reason}") from error
