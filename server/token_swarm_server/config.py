"""The configuration: one model, filled from a YAML file, the environment and the caller's own values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW
from token_swarm.particle import Mixture, Rule

ENV_PREFIX = "TOKEN_SWARM_"
ENV_DELIMITER = "__"
EXPERT_NAME = r"[a-z0-9][a-z0-9_.-]*"
DEMO_SCHEME = "demo:"
PUBLIC_MESSAGE_BYTES = 4 * 2**20
"""Cap of a message between the public service and its clients."""
DEFAULT_LISTEN = "127.0.0.1:50061"
# A hub id is "name" or "owner/name"; anything else is meant as a directory.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class ConfigError(ValueError):
    """A configuration that cannot be used. The message: source, path of the key, what is allowed."""


def _listen_address(value: str) -> str:
    """Refuse an address that nobody could listen on, and one that other machines could reach."""
    allowed = (
        f"must be host:port (host one of {', '.join(_LOOPBACK)}; port 0: any free one) or unix:/absolute/path"
    )
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path.startswith("/") or len(os.fsencode(path)) > 107:
            raise ValueError(f"{allowed} of less than 108 bytes")
        return value
    host, _, port = value.rpartition(":")
    if host not in _LOOPBACK or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        # Nothing is authenticated yet, so the server stays on this machine.
        raise ValueError(allowed)
    return value


class ExpertSettings(BaseModel):
    """One expert: a causal language model in a process of its own."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1)] | None = None
    """Directory or Hugging Face id; `demo:smollm2` and `demo:gemma3` are fetched when missing."""
    backend: Literal["transformers"] = "transformers"
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    """Default: the cores of this machine divided by the number of experts started here, at least 1."""
    max_sequences: Annotated[int, Field(ge=1)] = 16
    max_context: Annotated[int, Field(ge=2)] = 2048
    python: Path | None = None
    """Interpreter of another virtual environment that has token-swarm installed; default: this one."""
    address: Annotated[str, Field(min_length=1)] | None = None
    """gRPC address of an expert that runs already; it is used instead of starting one."""

    @model_validator(mode="after")
    def _startable_or_running(self) -> ExpertSettings:
        if self.model is None and self.address is None:
            raise ValueError("give model (to start the expert) or address (of one that runs)")
        return self


class CoordinatorSettings(BaseModel):
    """The process that mixes the experts and serves text."""

    model_config = ConfigDict(extra="forbid")

    listen: Annotated[str, AfterValidator(_listen_address)] = DEFAULT_LISTEN
    particles: Path | None = None
    """Folder of particle JSON files that requests may name."""
    rule: Literal["linear", "log-linear"] = "log-linear"
    weights: dict[str, float] = Field(default_factory=dict)
    """Mixture of a request that names none; empty: uniform over all experts."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = DEFAULT_EPSILON
    window: Annotated[int, Field(ge=1)] | None = DEFAULT_WINDOW
    lanes_per_expert: Annotated[int, Field(ge=1)] = 2
    max_queue: Annotated[int, Field(ge=0)] = 64


class Settings(BaseSettings):
    """Everything that `token-swarm serve` can be told. Made by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_parse_none_str="null",
        extra="forbid",
    )

    experts: dict[Annotated[str, Field(pattern=f"^{EXPERT_NAME}$")], ExpertSettings] = Field(min_length=1)
    coordinator: CoordinatorSettings = CoordinatorSettings()
    cache: Path = Path(".cache")
    """Converted models, vocabularies and logs; relative to the current directory."""
    pin_cores: bool = False
    """Give every local expert cores of its own where there are enough."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order of precedence, strongest first; the file comes in by `load_settings`."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings

    @model_validator(mode="after")
    def _weights_name_experts(self) -> Settings:
        if not self.coordinator.weights:
            return self
        for name in self.coordinator.weights:
            if name not in self.experts:
                known = ", ".join(sorted(self.experts))
                raise ValueError(f"coordinator.weights.{name}: there is no such expert; known: {known}")
        try:
            Mixture(self.coordinator.weights, Rule(self.coordinator.rule))
        except ValueError as error:
            raise ValueError(f"coordinator.{error}") from error
        return self

    def local_experts(self) -> dict[str, ExpertSettings]:
        """The experts that are started here, in the order of the configuration."""
        return {name: expert for name, expert in self.experts.items() if expert.address is None}


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """Read `config` (YAML), the environment and `overrides` (top-level keys; nested ones as mappings).

    Paths in the file are relative to it. Raises ConfigError.
    """
    from_file = {} if config is None else _read_yaml(config)
    _check_environment()

    class FromFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **sources: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            stronger = super().settings_customise_sources(settings_cls, *args, **sources)
            return (*stronger, InitSettingsSource(settings_cls, init_kwargs=from_file))

    try:
        return FromFile(**overrides)
    except ValidationError as error:
        raise ConfigError(_explain(error, config)) from error
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping with a key twice: YAML would keep the last one, and an expert would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file as a mapping, its paths made absolute. Raises ConfigError."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"config {path}:{where} not valid YAML: {reason}") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(f"config {path}: must be a mapping with the keys {_names(Settings)}")
    experts = document.get("experts")
    for expert in experts.values() if isinstance(experts, dict) else ():
        if isinstance(expert, dict):
            _make_absolute(expert, "model", path.parent)
            _make_absolute(expert, "python", path.parent)
    if isinstance(document.get("coordinator"), dict):
        _make_absolute(document["coordinator"], "particles", path.parent)
    return document


def _make_absolute(table: dict[str, Any], key: str, folder: Path) -> None:
    value = table.get(key)
    if not isinstance(value, str) or not value or value.startswith(DEMO_SCHEME):
        return
    path = folder.absolute() / Path(value).expanduser()
    if key == "model" and HUB_ID.fullmatch(value) and not path.is_dir():
        return
    table[key] = str(path)


def _check_environment() -> None:
    """Refuse variables with our prefix that name no key. Raises ConfigError."""
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX):
            key = name[len(ENV_PREFIX) :].lower().split(ENV_DELIMITER)[0]
            if key not in Settings.model_fields:
                allowed = ", ".join(ENV_PREFIX + field.upper() for field in Settings.model_fields)
                raise ConfigError(f"environment: {name}: unknown; allowed: {allowed} (and keys below by __)")


def _names(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _explain(error: ValidationError, config: Path | None) -> str:
    """The first problem as one line."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    path = ".".join(where)
    source = f"config {config}" if config else "settings"
    if problem["type"] == "extra_forbidden":
        models: Mapping[str, type[BaseModel]] = {
            "experts": ExpertSettings,
            "coordinator": CoordinatorSettings,
        }
        model = models[where[0]] if len(where) > 1 else Settings
        return f"{source}: {path}: unknown key; allowed: {_names(model)}"
    if "[key]" in problem["loc"]:
        return f"{source}: {path}: not a valid expert name; it must match {EXPERT_NAME}"
    if problem["type"] == "missing" or (path == "experts" and problem["type"] == "too_short"):
        return f"{source}: {path}: at least one expert is needed, as `NAME: {{model: DIRECTORY}}`"
    message = problem["msg"].removeprefix("Value error, ")
    shown = repr(problem["input"])
    value = "" if isinstance(problem["input"], dict | BaseModel) else f" (is {shown[:80]})"
    return f"{source}: {path + ': ' if path else ''}{message}{value}"
