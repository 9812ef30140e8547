"""The command line, `token-swarm`: one module a command. torch is imported only where it is used."""

from __future__ import annotations

import os

# grpc's own log repeats, in its words, what the commands report, and strangers could fill it with failed handshakes.
# It reads this when it is imported, so before anything below.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

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

app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Several language models as one: mixes their next-token distributions, whatever the tokenizers.\n\n"
    "Start with `token-swarm demo`. Every command has --help with an example.",
)
for command in (demo, serve, generate, score, search, data, examples, expert, health, top, doctor):
    app.command()(command)
app.add_typer(particles, name="particles")
app.add_typer(tokens, name="tokens")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="token-swarm")
