"""What the loading of every backend needs: the model's source, its tokenizer, a dtype, a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenizer_config.json")
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
    tokenizer = tokenizer_of(source)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:
        generation = None
    return config, generation, tokenizer


def tokenizer_of(source: str) -> Any:
    """The tokenizer of `source`, as `source_of` says it. Raises ExpertLoadError."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        # tokenizers raises plain exceptions for files that it cannot read.
        path = Path(source)
        if path.is_dir() and not any(found for name in _TOKENIZER_FILES for found in path.glob(name)):
            raise ExpertLoadError(f"model: {source} has no tokenizer: there is no tokenizer.json in it") from error
        raise ExpertLoadError(f"model: the tokenizer of {source} cannot be loaded: {_first_line(error)}") from error


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
    """What `from_pretrained` is given for a directory or hub id.

    Raises ExpertLoadError for a directory that is missing, or holds no model.
    """
    source = str(Path(model).expanduser()) if isinstance(model, Path) else model
    path = Path(source).expanduser()
    if path.is_dir():
        _require_model(path)
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


def _require_model(directory: Path) -> None:
    """Raise ExpertLoadError for a directory that holds something else than a model."""
    if (directory / "config.json").is_file():
        return
    if (directory / "adapter_config.json").is_file():
        raise ExpertLoadError(
            f"model: {directory} is a LoRA adapter, not a model; merge it into its base model and save that "
            "(peft: merge_and_unload, save_pretrained)"
        )
    if any(directory.glob("*.gguf")):
        raise ExpertLoadError(f"model: {directory} holds a GGUF file; a model directory of Hugging Face is needed")
    raise ExpertLoadError(f"model: {directory} holds no model: there is no config.json in it")


def _damage(source: str, error: Exception) -> str:
    """Which file of weights cannot be read, and why."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as found:
            return f"{path} is damaged or was not copied in full ({_first_line(found)})"
    return f"the weights in {source} are damaged ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def one_line(source: str) -> Iterator[None]:
    """Turn what transformers raises while it loads `source` into an ExpertLoadError of one line."""
    try:
        yield
    except SafetensorError as error:
        raise ExpertLoadError(f"model: {_damage(source, error)}") from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, ExpertLoadError):
            raise
        reason = _first_line(error)
        where = "" if Path(source).is_dir() else " is no directory here, and from the hub it"
        message = f"model: {source}{where} cannot be loaded as a causal language model: {reason}"
        raise ExpertLoadError(message) from error
