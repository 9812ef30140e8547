"""Fills the settings from a YAML file, the environment and the caller's own values."""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from token_swarm_server.config.settings import (
    CLIENT_VARIABLES,
    DEMO_SCHEME,
    ENV_DELIMITER,
    ENV_PREFIX,
    EXPERT_NAME,
    HUB_ID,
    ClientTls,
    ServerTls,
    Settings,
)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message: source, path of the key, what is allowed."""


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
        # What the help of the commands names is there only in a checkout, and after this command.
        hint = "; `token-swarm examples` writes the examples" if path.parent.name == "examples" else ""
        raise ConfigError(f"config {path}: cannot be read: {error.strerror}{hint}") from error
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
            _make_tls_absolute(expert, path.parent)
    if isinstance(document.get("coordinator"), dict):
        _make_absolute(document["coordinator"], "particles", path.parent)
        _make_absolute(document["coordinator"], "tokens", path.parent)
        _make_tls_absolute(document["coordinator"], path.parent)
    return document


def _make_absolute(table: dict[str, Any], key: str, folder: Path) -> None:
    value = table.get(key)
    if not isinstance(value, str) or not value or value.startswith(DEMO_SCHEME):
        return
    path = folder.absolute() / Path(value).expanduser()
    if key == "model" and HUB_ID.fullmatch(value) and not path.is_dir():
        return
    table[key] = str(path)


def _make_tls_absolute(table: dict[str, Any], folder: Path) -> None:
    if isinstance(tls := table.get("tls"), dict):
        for key in ServerTls.model_fields.keys() | ClientTls.model_fields.keys():
            _make_absolute(tls, key, folder)


def _check_environment() -> None:
    """Refuse variables with our prefix that name no key. Raises ConfigError."""
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES:
            key = name[len(ENV_PREFIX) :].lower().split(ENV_DELIMITER)[0]
            if key not in Settings.model_fields:
                allowed = ", ".join(ENV_PREFIX + field.upper() for field in Settings.model_fields)
                raise ConfigError(f"environment: {name}: unknown; allowed: {allowed} (and keys below by __)")


def _table_at(where: Sequence[str]) -> type[BaseModel]:
    """The model that the table with the path `where` is read into."""
    model: type[BaseModel] = Settings
    parts = list(where)
    while parts and (field := model.model_fields.get(parts.pop(0))) is not None:
        if typing.get_origin(field.annotation) is dict:
            # The next part is a name that the user chose.
            parts = parts[1:]
        kinds = typing.get_args(field.annotation) or (field.annotation,)
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model


def _names(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _explain(error: ValidationError, config: Path | None) -> str:
    """The first problem as one line."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    path = ".".join(where)
    source = f"config {config}" if config else "settings"
    if problem["type"] == "extra_forbidden":
        return f"{source}: {path}: unknown key; allowed: {_names(_table_at(where[:-1]))}"
    if "[key]" in problem["loc"]:
        return f"{source}: {path}: not a valid expert name; it must match {EXPERT_NAME}"
    if path == "experts" and problem["type"] in ("missing", "too_short"):
        return f"{source}: {path}: at least one expert is needed, as `NAME: {{model: DIRECTORY}}`"
    if problem["type"] == "missing":
        return f"{source}: {path}: is needed; the keys beside it: {_names(_table_at(where[:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = repr(problem["input"])
    value = "" if isinstance(problem["input"], dict | BaseModel) else f" (is {shown[:80]})"
    return f"{source}: {path + ': ' if path else ''}{message}{value}"
