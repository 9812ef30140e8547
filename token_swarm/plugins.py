"""What other distributions add: objects behind entry points, found by name and imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from token_swarm.errors import PluginError, UnknownName


class Registry:
    """Objects of one kind by name: those of this package, and those that an entry point group adds.

    The names cost no import. A built-in name cannot be taken by others.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str]) -> None:
        """kind: what errors call an entry, such as "backend"; built_in: `module:attribute` by name."""
        self.kind, self.group = kind, group
        self._built_in = {name: EntryPoint(name, value, group) for name, value in built_in.items()}

    def names(self) -> tuple[str, ...]:
        """The built-in ones in their order, then the others in alphabetical order."""
        return tuple(self._entries())

    def load(self, name: str) -> Any:
        """The object. Raises UnknownName, and PluginError for one of others that cannot be imported."""
        entries = self._entries()
        if name not in entries:
            raise UnknownName(self.kind, name, entries)
        entry = entries[name]
        if name in self._built_in:
            return getattr(importlib.import_module(entry.module), entry.attr)
        try:
            return entry.load()
        except Exception as error:  # whatever a stranger's module does when it is imported
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise self.broken(name, f"cannot be imported: {reason[0]}") from error

    def is_built_in(self, name: str) -> bool:
        """Whether this package has it."""
        return name in self._built_in

    def broken(self, name: str, problem: str) -> PluginError:
        """The error of an entry point that does not keep the contract."""
        return PluginError(self.group, f"{name} = {self._entries()[name].value}", problem)

    def require(self, name: str, loaded: object, attributes: tuple[str, ...]) -> None:
        """Raise PluginError unless `loaded` has all the attributes."""
        if missing := [each for each in attributes if not hasattr(loaded, each)]:
            raise self.broken(name, f"a {self.kind} needs {', '.join(attributes)}; it lacks {', '.join(missing)}")

    def _entries(self) -> dict[str, EntryPoint]:
        # Looked up anew each time: it takes about a millisecond, and tests install distributions as they go.
        added = {entry.name: entry for entry in entry_points(group=self.group)}
        return {**self._built_in, **{name: added[name] for name in sorted(added) if name not in self._built_in}}
