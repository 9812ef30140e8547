"""The expert backends by name: `transformers`, `vllm`, and those of entry points in the group `token_swarm.backends`.

A backend is a callable, such as a class, that loads a model and returns an `Expert`. It is called with (name, model)
and the keywords device, dtype, threads, max_sequences and max_context, whose values a configuration has checked; with
`engine`, a mapping of its own options, where it takes that; and with `on_failure`, to be called when the expert can
serve no more, where it takes that. It raises ValueError, in one line, for what it cannot do. Nothing heavy is imported
before one is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from token_swarm.plugins import Registry

if TYPE_CHECKING:
    from token_swarm.experts.contract import Expert

EngineValue: TypeAlias = bool | int | float | str

BACKENDS = Registry(
    "backend",
    "token_swarm.backends",
    {
        "transformers": "token_swarm.experts.transformers.expert:TransformersExpert",
        "vllm": "token_swarm.experts.vllm.expert:VllmExpert",
    },
)
DEFAULT_BACKEND = "transformers"
# Built-in backends say what `engine` may hold without being imported themselves.
_ENGINE_CHECKS = Registry("backend", "token_swarm.backends", {"vllm": "token_swarm.experts.vllm.options:check_options"})
_NO_ENGINE = "engine: the {} backend takes no options of its own"
_CONTRACT = ("spec", "encode", "tokenize", "step", "stats", "close")


def check_backend(name: str, engine: Mapping[str, EngineValue]) -> None:
    """Refuse a backend that is not there, and engine options that a built-in one does not take, without loading it.

    Raises ValueError; its message is one line and begins with the key.
    """
    if name not in BACKENDS.names():
        raise ValueError(f"backend: {name!r} is not one of {', '.join(map(repr, BACKENDS.names()))}")
    if not engine or not BACKENDS.is_built_in(name):
        return
    if not _ENGINE_CHECKS.is_built_in(name):
        raise ValueError(_NO_ENGINE.format(name))
    _ENGINE_CHECKS.load(name)(engine)


def load_expert(
    backend: str,
    name: str,
    model: str | Path,
    *,
    engine: Mapping[str, EngineValue] | None = None,
    on_failure: Callable[[], None] | None = None,
    **options: Any,
) -> Expert:
    """The expert `name` on `model`, a directory or hub id. options: device, dtype, threads, max_sequences, max_context.

    Raises UnknownName for a backend that is not there, PluginError for one of others that breaks the contract, and
    ExpertLoadError for what the backend cannot load.
    """
    from token_swarm.experts.loading import ExpertLoadError

    load: Callable[..., Expert] = BACKENDS.load(backend)
    if not callable(load):
        raise BACKENDS.broken(backend, f"a backend is a callable that returns an expert, not a {type(load).__name__}")
    taken = _keywords(load)
    if engine:
        if taken is not None and "engine" not in taken:
            raise ExpertLoadError(_NO_ENGINE.format(backend))
        options["engine"] = engine
    if on_failure is not None and (taken is None or "on_failure" in taken):
        options["on_failure"] = on_failure
    if taken is not None and (missing := [key for key in options if key not in taken]):
        raise BACKENDS.broken(backend, f"it does not take {', '.join(missing)}")
    if BACKENDS.is_built_in(backend):
        return load(name, model, **options)
    try:
        expert = load(name, model, **options)
    except ValueError as error:
        raise ExpertLoadError(str(error)) from error
    BACKENDS.require(backend, expert, _CONTRACT)
    return expert


def _keywords(load: Callable[..., object]) -> set[str] | None:
    """Names of the keywords that a backend takes; None: any."""
    parameters = inspect.signature(load).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return None
    return {each.name for each in parameters}


def parse_options(pairs: list[str]) -> dict[str, EngineValue]:
    """`KEY=VALUE` strings, as on a command line, to options.

    Raises ValueError for a pair without `=`; the keys are for `check_backend`.
    """
    options: dict[str, EngineValue] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"engine: {pair!r} is not KEY=VALUE")
        options[key] = parse_value(text)
    return options


def parse_value(text: str) -> EngineValue:
    """A value that was written as text: true, false and numbers are read as such."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
