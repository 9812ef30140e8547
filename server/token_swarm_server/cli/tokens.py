"""`token-swarm tokens`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from token_swarm_server.cli import options
from token_swarm_server.cli.errors import FAILURE, CliError

tokens = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Make, list and revoke the bearer tokens that a server takes.\n\n"
    "The file holds no token, only its SHA-256. A running server sees a change of the file at once.",
)
File = Annotated[Path, typer.Option("--file", help="The server's file of tokens: coordinator.tokens.", metavar="FILE")]
Name = Annotated[str, typer.Argument(help="Whose token it is.")]


@tokens.command()
def create(
    name: Name,
    file: File,
    out: Annotated[
        Path | None, typer.Option(help="Write the token to this new file instead of printing it.", metavar="FILE")
    ] = None,
) -> None:
    """Make a token and print it, this once.

    \b
    Example:
      token-swarm tokens create alice --file tokens.json --out alice.token
    """
    from token_swarm_server.rpc.bearer_tokens import create_token, revoke_token

    if out is not None and out.exists():
        raise CliError(f"--out: {out} exists already; name a new file")
    try:
        token = create_token(file, name)
    except OSError as error:
        raise _cannot_write(error, file) from error
    if out is None:
        print(token)
        return
    try:
        # Not `write_text`: others could read the file before its mode is changed.
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as written:
            written.write(f"{token}\n")
    except OSError as error:
        revoke_token(file, name)
        raise CliError(f"--out: {out} cannot be written: {error.strerror}", FAILURE) from error


@tokens.command("list")
def list_tokens(file: File, as_json: options.Json = False) -> None:
    """List whose tokens there are.

    \b
    Example:
      token-swarm tokens list --file tokens.json
    """
    from token_swarm_server.rpc.bearer_tokens import read_tokens

    entries = read_tokens(file, "--file").values()
    if as_json:
        print(json.dumps({"tokens": [{"name": each.name, "created": each.created} for each in entries]}))
        return
    from rich.console import Console

    from token_swarm_server.cli.report import plain_table

    table = plain_table("name", "created")
    for each in entries:
        table.add_row(each.name, each.created)
    Console().print(table)


@tokens.command()
def revoke(name: Name, file: File) -> None:
    """Take a token back; the next call with it is refused.

    \b
    Example:
      token-swarm tokens revoke alice --file tokens.json
    """
    from token_swarm_server.rpc.bearer_tokens import revoke_token

    try:
        revoke_token(file, name)
    except OSError as error:
        raise _cannot_write(error, file) from error


def _cannot_write(error: OSError, file: Path) -> CliError:
    return CliError(f"--file: {file} cannot be written: {error.strerror}", FAILURE)
