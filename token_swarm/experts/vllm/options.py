"""Which of vLLM's engine arguments an expert's configuration may set, and what each may hold. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from token_swarm.experts.registry import EngineValue


@dataclass(frozen=True)
class _Option:
    """`argument`: the name in vLLM's EngineArgs."""

    argument: str
    allowed: str
    check: Callable[[EngineValue], bool]


def _count(value: EngineValue) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _flag(value: EngineValue) -> bool:
    return isinstance(value, bool)


def _name(value: EngineValue) -> bool:
    return isinstance(value, str) and bool(value)


def _fraction(value: EngineValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


_COUNT = "a whole number, at least 1"
_NAME = "a name that vLLM knows"

OPTIONS: Mapping[str, _Option] = {
    "block_size": _Option("block_size", _COUNT, _count),
    "enforce_eager": _Option("enforce_eager", "true or false", _flag),
    "gpu_memory_utilization": _Option("gpu_memory_utilization", "above 0, at most 1", _fraction),
    "kv_cache_dtype": _Option("kv_cache_dtype", _NAME, _name),
    "kv_cache_memory": _Option("kv_cache_memory_bytes", "bytes, at least 1", _count),
    "load_format": _Option("load_format", _NAME, _name),
    "max_num_batched_tokens": _Option("max_num_batched_tokens", _COUNT, _count),
    "quantization": _Option("quantization", _NAME, _name),
    "revision": _Option("revision", "a branch, tag or commit", _name),
    "tensor_parallel_size": _Option("tensor_parallel_size", _COUNT, _count),
    "trust_remote_code": _Option("trust_remote_code", "true or false", _flag),
}
"""By the key of the configuration. What an expert sets itself is not here: dtype, max_context, max_sequences."""


def check_options(options: Mapping[str, EngineValue]) -> None:
    """Refuse what cannot be passed on. Raises ValueError, one line that names the key."""
    for key, value in options.items():
        option = OPTIONS.get(key)
        if option is None:
            raise ValueError(f"engine.{key}: unknown; allowed: {', '.join(OPTIONS)}")
        if not option.check(value):
            raise ValueError(f"engine.{key}: {value!r} is not allowed, it must be {option.allowed}")


def engine_arguments(options: Mapping[str, EngineValue]) -> dict[str, EngineValue]:
    """Checked options by the names of vLLM's EngineArgs."""
    return {OPTIONS[key].argument: value for key, value in options.items()}
