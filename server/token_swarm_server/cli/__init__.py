"""The command line, `token-swarm`: one module a command. torch is imported only where it is used."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

# grpc's own log repeats, in its words, what the commands report, and strangers could fill it with failed handshakes.
# It reads this when it is imported, so before anything below.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

try:
    import typer

    from token_swarm_server.cli.bench import bench
    from token_swarm_server.cli.data import data
    from token_swarm_server.cli.demo import demo
    from token_swarm_server.cli.doctor import doctor
    from token_swarm_server.cli.errors import Group
    from token_swarm_server.cli.examples import examples
    from token_swarm_server.cli.expert import expert
    from token_swarm_server.cli.generate import generate
    from token_swarm_server.cli.health import health
    from token_swarm_server.cli.particles import particles
    from token_swarm_server.cli.score import score
    from token_swarm_server.cli.search import search
    from token_swarm_server.cli.serve import serve
    from token_swarm_server.cli.tokens import tokens
    from token_swarm_server.cli.top import top
except KeyboardInterrupt:
    # Imports take a second, in which a user may press Ctrl-C already.
    raise SystemExit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"token-swarm {version('token-swarm')}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Several language models as one: mixes their next-token distributions, whatever the tokenizers.

    Start with `token-swarm demo`. Every command has --help with an example.
    """


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(_root)
for command in (demo, serve, generate, score, search, data, examples, expert, health, top, doctor):
    app.command()(command)
app.add_typer(particles, name="particles")
app.add_typer(tokens, name="tokens")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="token-swarm")
