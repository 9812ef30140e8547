"""One line on stderr and an exit code for everything that can go wrong."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from token_swarm.errors import BadParameter, FailedPrecondition, UnknownName
from token_swarm_server.config.loading import ConfigError

BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130


class CliError(Exception):
    """What the user is told, and the exit code: BAD_INPUT for their mistakes, FAILURE for the world's."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


class Group(TyperGroup):
    """Commands whose errors are printed as `error: ...`, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn what it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except TyperException as error:
            self._fail(error.format_message(), error.exit_code)
        except CliError as error:
            self._fail(str(error), error.code)
        except (ConfigError, BadParameter, UnknownName, FailedPrecondition) as error:
            self._fail(str(error), BAD_INPUT)

    @staticmethod
    def _fail(message: str, code: int) -> None:
        # Text from a server or a model's name may hold what would start a new line, or a terminal sequence.
        line = " ".join(message.split())
        printable = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
        print(f"error: {printable}", file=sys.stderr)
        raise typer.Exit(code)
