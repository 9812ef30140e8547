"""Which of vLLM's engine arguments an expert's configuration may set, and what each may hold. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str


@dataclass(frozen=True)
class _Option:
    """`argument`: the name in vLLM's EngineArgs."""

    argument: str
    allowed: str
    check: Callable[[Value], bool]


def _count(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _flag(value: Value) -> bool:
    return isinstance(value, bool)


def _name(value: Value) -> bool:
    return isinstance(value, str) and bool(value)


def _fraction(value: Value) -> bool:
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


def check_options(options: Mapping[str, Value]) -> None:
    """Refuse what cannot be passed on. Raises ValueError, one line that names the key."""
    for key, value in options.items():
        option = OPTIONS.get(key)
        if option is None:
            raise ValueError(f"engine.{key}: unknown; allowed: {', '.join(OPTIONS)}")
        if not option.check(value):
            raise ValueError(f"engine.{key}: {value!r} is not allowed, it must be {option.allowed}")


def parse_options(pairs: list[str]) -> dict[str, Value]:
    """`KEY=VALUE` strings, as on a command line, to options.

    Raises ValueError for a pair without `=`; the keys are for `check_options`.
    """
    options: dict[str, Value] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"engine: {pair!r} is not KEY=VALUE")
        options[key] = parse_value(text)
    return options


def engine_arguments(options: Mapping[str, Value]) -> dict[str, Value]:
    """Checked options by the names of vLLM's EngineArgs."""
    return {OPTIONS[key].argument: value for key, value in options.items()}


def parse_value(text: str) -> Value:
    """A value that was written as text: true, false and numbers are read as such."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
