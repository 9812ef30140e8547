"""The flags that several commands share, and what they mean on the wire."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from token_swarm.mixing.defaults import MOST_DRAFT_TOKENS
from token_swarm.particle import Mixture, Rule
from token_swarm_server.cli.errors import CliError, remember_variable
from token_swarm_server.config.addresses import check_target
from token_swarm_server.config.explanation import check_environment
from token_swarm_server.config.settings import DEFAULT_LISTEN, ENV_PREFIX, ClientTls

UINT64 = 2**64 - 1
"""Largest seed, and largest limit of a text."""


class RuleName(StrEnum):
    """Values of --rule."""

    LINEAR = "linear"
    LOG_LINEAR = "log-linear"


class UnitName(StrEnum):
    """Values of --unit."""

    AUTO = "auto"
    TOKEN = "token"
    BYTE = "byte"
    UNION = "union"


def _target(value: str | None) -> str | None:
    """An address to connect to, read before anything is done. Raises CliError."""
    try:
        return None if value is None else check_target(value)
    except ValueError as error:
        raise CliError(f"--address: {value!r} is not allowed; it {error}") from error


Address = Annotated[
    str | None,
    typer.Option(
        help=f"Address of a running server: host:port or unix:/path.  [default: {DEFAULT_LISTEN}]", callback=_target
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="YAML file: start a server with it for this call only.", metavar="FILE")
]
Weights = Annotated[
    str | None, typer.Option(help="Weight per expert, such as smollm2=0.4,qwen2.5-coder=0.6.", metavar="NAME=W,...")
]
ParticleName = Annotated[str | None, typer.Option(help="Named mixture of the server, instead of --weights.")]
RuleOption = Annotated[RuleName | None, typer.Option(help="How the weights combine the experts.")]
UnitOption = Annotated[
    UnitName,
    typer.Option(
        help="What is mixed; auto: tokens if all experts share them, else bytes; "
        "union: tokens of all vocabularies as strings (GaC, UniTE), approximate, to compare with."
    ),
]
Epsilon = Annotated[float | None, typer.Option(help="Most total variation that a next-byte law may be off; 0: exact.")]
DraftTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens to compute ahead of the text; in float32 it stays the same.", min=0, max=MOST_DRAFT_TOKENS
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Render the prompt as the user's turn of a chat.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Where models are kept.  [default: .cache of a checkout, else ~/.cache/token-swarm]",
        envvar=f"{ENV_PREFIX}CACHE",
        metavar="FOLDER",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
# Never a flag with the token itself: every user of the machine sees the flags of every process.
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help=f"File with the token to send; without it the variable {ENV_PREFIX}TOKEN counts.",
        envvar=f"{ENV_PREFIX}TOKEN_FILE",
        metavar="FILE",
        callback=remember_variable,
    ),
]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt; the flags --tls-... mean it as well.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        help="Authorities that may have signed the server's certificate; default: public ones.",
        envvar=f"{ENV_PREFIX}TLS_CA",
        metavar="PEM",
        callback=remember_variable,
    ),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(
        help="Certificate to show to the server.",
        envvar=f"{ENV_PREFIX}TLS_CERTIFICATE",
        metavar="PEM",
        callback=remember_variable,
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        help="Private key of that certificate.",
        envvar=f"{ENV_PREFIX}TLS_KEY",
        metavar="PEM",
        callback=remember_variable,
    ),
]
# What RFC 6750 allows in a bearer token.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True)
class Credentials:
    """How a command reaches a server that runs: encrypted or not, with a token or without."""

    tls: ClientTls | None = None
    token: str | None = None


PLAIN = Credentials()
"""No encryption and no token: for addresses that stay on this machine."""


def credentials(
    token_file: Path | None, tls: bool, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None
) -> Credentials:
    """What the flags and variables say. Raises CliError, whose message never holds the token, and ConfigError."""
    # A misspelt variable would otherwise send no token, or not encrypt.
    check_environment()
    token = os.environ.get(f"{ENV_PREFIX}TOKEN")
    source = f"environment: {ENV_PREFIX}TOKEN"
    if token_file is not None:
        source = "--token-file"
        token = read_text("--token-file", None, token_file).strip()
    if token is not None and not _TOKEN.fullmatch(token):
        raise CliError(f"{source}: holds no token; allowed is one word of letters, digits and - . _ ~ + / =")
    if (tls_certificate is None) != (tls_key is None):
        raise CliError("--tls-certificate: give it and --tls-key, or neither")
    if not (tls or tls_ca or tls_certificate):
        return Credentials(None, token)
    return Credentials(ClientTls(ca=tls_ca, certificate=tls_certificate, key=tls_key), token)


def parse_weights(text: str, rule: Rule) -> Mixture:
    """`a=0.4,b=0.6` as a mixture. Raises CliError; BadParameter for weights that define no distribution."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        name = name.strip()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
            equals = ""
        if not name or not equals:
            raise CliError(f"--weights: {part!r} is not NAME=NUMBER; allowed: smollm2=0.4,qwen2.5-coder=0.6")
        if name in weights:
            raise CliError(f"--weights: {name} is given twice")
        weights[name] = value
    return Mixture(weights, rule)


def mixing_fields(weights: str | None, particle: str | None, rule: RuleName | None) -> dict[str, Any]:
    """Fields of a GenerateRequest or ScoreRequest that say how to mix. Raises CliError."""
    from token_swarm.v1 import swarm_pb2

    fields: dict[str, Any] = {}
    if particle is not None and (weights is not None or rule is not None):
        raise CliError("--particle: a particle has weights and a rule of its own; leave out --weights and --rule")
    if particle is not None:
        fields["particle"] = particle
    elif weights is not None:
        mixture = parse_weights(weights, Rule(rule.value) if rule else Rule.LOG_LINEAR)
        fields["mixture"] = swarm_pb2.Mixture(
            rule=swarm_pb2.Rule.Value(f"RULE_{rule.name}") if rule else swarm_pb2.RULE_UNSPECIFIED,
            weights=[swarm_pb2.ExpertWeight(expert=name, weight=w) for name, w in mixture.weights.items()],
        )
    elif rule is not None:
        raise CliError("--rule: give --weights as well, such as --weights smollm2=0.5,qwen2.5-coder=0.5")
    return fields


def warn_of_plain_experts(names: Iterable[str]) -> None:
    """Say on standard error which experts of a chat have no chat template."""
    for name in names:
        # What a server calls an expert could hold a terminal sequence.
        shown = name if name.isprintable() else repr(name)
        print(
            f"warning: {shown} has no chat template and continued the question as text; give --weights without it",
            file=sys.stderr,
        )


def read_text(option: str, value: str | None, file: Path | None = None) -> str:
    """The text of a flag, else of `file`, else of standard input. Raises CliError unless it is UTF-8."""
    if value is not None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CliError(f"{option}: not valid UTF-8 at character {error.start}") from error
        return value
    source = str(file) if file else "standard input"
    if file is None and sys.stdin.isatty():
        raise CliError(f"{option}: is missing; give it, or pipe a text in")
    try:
        text = (file.read_bytes() if file else sys.stdin.buffer.read()).decode()
    except OSError as error:
        raise CliError(f"{option}: {source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CliError(f"{option}: {source} is not valid UTF-8 at byte {error.start}") from error
    if not text and file is None:
        # A pipe whose first command failed; who means it says so.
        raise CliError(f"{option}: {source} is empty; give {option} '' if that is meant")
    return text
