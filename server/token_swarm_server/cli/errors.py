"""One line on stderr and an exit code for everything that can go wrong."""

from __future__ import annotations

import errno
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from token_swarm.errors import BadParameter, FailedPrecondition, UnknownName
from token_swarm_server.config.loading import ConfigError

BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130


_FROM_ENVIRONMENT = "token_swarm.environment"


def remember_variable(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Callback of an option with a variable: errors about the option name the variable where that was used."""
    source = context.get_parameter_source(parameter.name or "")
    if value is not None and source is not None and source.name == "ENVIRONMENT":
        flag = max(parameter.opts, key=len)
        context.meta.setdefault(_FROM_ENVIRONMENT, {})[flag] = parameter.envvar
    return value


def _sourced(message: str, context: Any) -> str:
    """The message about a flag, with the name of the variable that its value came from."""
    for flag, variable in context.meta.get(_FROM_ENVIRONMENT, {}).items():
        if message.startswith(f"{flag}: "):
            return f"environment: {variable}{message[len(flag) :]}"
    return message


class CliError(Exception):
    """What the user is told, and the exit code: BAD_INPUT for their mistakes, FAILURE for the world's."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


class Group(TyperGroup):
    """Commands whose errors are printed as `error: ...`, without a traceback."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the flags before the command's name."""
        try:
            return super().make_context(*args, **extra)
        except TyperException as error:
            self._refuse(error)

    def invoke(self, ctx: Any) -> Any:
        """Run the command and turn what it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except TyperException as error:
            self._refuse(error)
        except CliError as error:
            self._fail(_sourced(str(error), ctx), error.code)
        except (ConfigError, BadParameter, UnknownName, FailedPrecondition) as error:
            self._fail(_sourced(str(error), ctx), BAD_INPUT)
        except OSError as error:
            # A reader of the output that has left, such as `head`, is told nothing: it has what it wanted.
            if error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            self._fail(f"{where}{error.strerror or error}", FAILURE)

    def _refuse(self, error: TyperException) -> NoReturn:
        message = error.format_message()
        if "\n" in message:
            # The help of a group of commands that was given none.
            raise error
        # pydantic's words.
        message = message.replace("Value error, ", "").replace("Input should be", "must be")
        command = getattr(getattr(error, "ctx", None), "command", None)
        flags = {each.name for each in getattr(command, "params", ())}
        if "unexpected extra argument" in message and "prompt" in flags:
            message += "; a prompt is given as --prompt TEXT, in quotes"
        self._fail(message, error.exit_code)

    @staticmethod
    def _fail(message: str, code: int) -> NoReturn:
        # Text from a server or a model's name may hold what would start a new line, or a terminal sequence.
        line = " ".join(message.split())
        printable = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
        print(f"error: {printable}", file=sys.stderr)
        raise typer.Exit(code)
