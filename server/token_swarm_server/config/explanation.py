"""What is wrong with a configuration, in one line: who said it, the path of the key, and what is allowed."""

from __future__ import annotations

import difflib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from token_swarm_server.config.settings import (
    ENV_DELIMITER,
    ENV_PREFIX,
    EXPERT_NAME,
    OTHER_VARIABLES,
    CoordinatorSettings,
    Settings,
)

_TABLE = ("model_type", "model_attributes_type", "dict_type")
_KINDS = {
    "int": "must be an integer",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be a text (in quotes where YAML reads a number)",
    "path": "must be a path",
}
_NONE = object()


class ConfigError(ValueError):
    """A configuration that cannot be used. The message: source, path of the key, what is allowed."""


def check_environment() -> None:
    """Refuse variables with our prefix that name no key. Raises ConfigError."""
    known = [ENV_PREFIX + field.upper() for field in Settings.model_fields]
    for name, path in _variables().items():
        if path[0] not in Settings.model_fields:
            raise ConfigError(
                f"environment: {name}: unknown{_meant_variable(path)}; allowed: {', '.join(known)} "
                f"(and keys below by {ENV_DELIMITER}), and apart from these {', '.join(OTHER_VARIABLES)}"
            )


def _meant_variable(path: Sequence[str]) -> str:
    """Which variable one may have been meant for that names no key."""
    if path[0] in CoordinatorSettings.model_fields:
        return f" (did you mean {ENV_PREFIX}COORDINATOR{ENV_DELIMITER}{ENV_DELIMITER.join(path).upper()}?)"
    clients = [name.removeprefix(ENV_PREFIX).lower() for name in OTHER_VARIABLES]
    close = difflib.get_close_matches(path[0], [*Settings.model_fields, *clients], 1)
    meant = ENV_DELIMITER.join([*close, *path[1:]]).upper()
    return f" (did you mean {ENV_PREFIX}{meant}?)" if close else ""


def _variables() -> dict[str, list[str]]:
    """Path of the key by variable with our prefix, but for those that are no keys."""
    return {
        name: name[len(ENV_PREFIX) :].lower().split(ENV_DELIMITER)
        for name in sorted(os.environ)
        if name.upper().startswith(ENV_PREFIX) and name not in OTHER_VARIABLES
    }


def unreadable() -> str:
    """The line for a variable that stands for a whole table and is not JSON."""
    for name in _variables():
        try:
            json.loads(os.environ[name])
        except ValueError:
            if os.environ[name].lstrip().startswith(("{", "[")) or ENV_DELIMITER not in name:
                return f"environment: {name}: must be JSON, such as {{\"window\": 4}} (is {os.environ[name][:80]!r})"
    return "environment: a variable that stands for a table must be JSON"


@dataclass(frozen=True)
class Sources:
    """Where settings come from, strongest first: `overrides` of flags, the environment, the file `config`."""

    overrides: Mapping[str, Any]
    config: Path | None
    from_file: Mapping[str, Any]

    def of(self, keys: Sequence[str]) -> str:
        """Who gave the value at the path `keys`, or the table in which it is missing."""
        found = _at(self.overrides, keys)
        if keys and found is not _NONE:
            return f"--{keys[-1].replace('_', '-')}"
        variables = _variables()
        for name, path in variables.items():
            # A variable for the key itself, or for a table that it is in.
            if path == list(keys[: len(path)]):
                return f"environment: {name}"
        if keys and _at(self.from_file, keys) is _NONE:
            for name, path in variables.items():
                if path[: len(keys)] == list(keys):
                    return f"environment: {name}"
        return "settings" if self.config is None else f"config {self.config}"


def _at(table: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value at a path of keys, or _NONE."""
    found: Any = table
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            return _NONE
        found = found[key]
    return found


def _table_at(where: Sequence[str]) -> type[BaseModel] | None:
    """The model that the table with the path `where` is read into; None for a table of names the user chose."""
    model: type[BaseModel] | None = Settings
    parts = list(where)
    while parts:
        field = model.model_fields.get(parts.pop(0)) if model else None
        if field is None:
            return None
        kinds = typing.get_args(field.annotation) or (field.annotation,)
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if typing.get_origin(field.annotation) is dict:
            # The next part is a name that the user chose.
            if not parts:
                return None
            parts = parts[1:]
    return model


def names_of(model: type[BaseModel]) -> str:
    """The keys of a table."""
    return ", ".join(model.model_fields)


def _allowed(where: Sequence[str]) -> str:
    table = _table_at(where)
    return "names of experts" if table is None else names_of(table)


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def explain(error: ValidationError, sources: Sources) -> str:
    """The problem that says most as one line."""
    problems = error.errors()
    # A key that is misspelt is often missing as well.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    kind, value = problem["type"], problem["input"]
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    message = problem["msg"].removeprefix("Value error, ")
    # A check of several keys begins with the path of the one to blame.
    blamed = re.findall(r"[\w-]+", found[0]) if (found := re.match(r"[\w.\[\]-]+(?=: )", message)) else []
    named = where[:-1] if kind == "missing" else [*where, *blamed]
    source, path = sources.of(named), ".".join(where)
    if kind == "extra_forbidden":
        table = _table_at(where[:-1])
        meant = _meant(where[-1], table.model_fields if table else ())
        return f"{source}: {path}: unknown key{meant}; allowed: {_allowed(where[:-1])}"
    if "[key]" in problem["loc"]:
        return f"{source}: {path}: not a valid expert name; it must match {EXPERT_NAME}"
    if path == "experts" and kind in ("missing", "too_short"):
        return f"{source}: {path}: at least one expert is needed, as `NAME: {{model: DIRECTORY}}`"
    if kind == "missing":
        return f"{source}: {path}: is needed; the keys beside it: {_allowed(where[:-1])}"
    if kind in _TABLE:
        return f"{source}: {path}: {_as_a_table(where, value)}"
    shown = "" if isinstance(value, dict | BaseModel) else f" (is {repr(value)[:80]})"
    return f"{source}: {path + ': ' if path else ''}{_in_words(kind, message)}{shown}"


def _in_words(kind: str, message: str) -> str:
    """pydantic's message in the words of this project."""
    if kind == "string_too_short":
        return "must not be empty"
    if kind.endswith(("_parsing", "_type")) and (of := kind.partition("_")[0]) in _KINDS:
        return _KINDS[of]
    return message.replace("Input should be", "must be")


def _as_a_table(where: Sequence[str], value: object) -> str:
    """What to write where a table is wanted and `value` stands."""
    if where == ["experts"]:
        return "must be a table of experts by name, as `NAME: {model: DIRECTORY}`"
    if len(where) == 2 and where[0] == "experts" and (value is None or isinstance(value, str)):
        return f"write {{model: {value or 'DIRECTORY'}}}"
    table = _table_at(where)
    keys = "" if table is None else f" of the keys {names_of(table)}"
    return f"must be a table{keys} (is {repr(value)[:80]})"
