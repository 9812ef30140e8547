"""Fills the settings from a YAML file, the environment and the caller's own values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsError

from token_swarm_server.config.explanation import ConfigError, Sources, check_environment, explain, names_of, unreadable
from token_swarm_server.config.settings import DEMO_SCHEME, HUB_ID, ClientTls, ServerTls, Settings

__all__ = ["ConfigError", "load_settings"]


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """Read `config` (YAML), the environment and `overrides` (top-level keys; nested ones as mappings).

    Paths in the file are relative to it. Raises ConfigError.
    """
    from_file = {} if config is None else _read_yaml(config)
    check_environment()

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
        raise ConfigError(explain(error, Sources(overrides, config, from_file))) from error
    except SettingsError as error:
        raise ConfigError(unreadable()) from error


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
        named = path.parent.name == "examples" and not path.is_dir()
        hint = "; `token-swarm examples` writes the examples" if named else _nearby(path)
        raise ConfigError(f"config {path}: cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        if "'\\t'" in reason:
            reason = "it is indented with a tab; YAML takes spaces"
        raise ConfigError(f"config {path}:{where} not valid YAML: {reason}") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(f"config {path}: must be a mapping with the keys {names_of(Settings)}")
    # A heading whose keys are all commented out.
    document = {key: value for key, value in document.items() if value is not None}
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


def _nearby(path: Path) -> str:
    """What to give instead of a directory, or of a file that is not there; empty if nothing suggests itself."""
    if path.is_dir():
        there = sorted(found.name for found in path.glob("*.y*ml"))
        return f"; give a file in it, such as {path / there[0]}" if there else "; give a YAML file"
    return "" if path.is_absolute() else f" (looked in {Path.cwd()})"


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
