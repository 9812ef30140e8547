"""`token-swarm score`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import CliError
from token_swarm_server.cli.mixing_checks import check_mixing

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc


def score(
    text: Annotated[str | None, typer.Option(help="Text to score; default: standard input.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="File with the text to score.", metavar="FILE")] = None,
    prompt: Annotated[str, typer.Option(help="Text that comes before and is not scored.")] = "",
    chat: options.Chat = False,
    weights: options.Weights = None,
    particle: options.ParticleName = None,
    rule: options.RuleOption = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Of a text longer than an expert's context: bytes that each window after the first scores, after as "
            "much of the text before them as fits. Default: half of what the shortest context holds.",
            min=1,
            metavar="BYTES",
        ),
    ] = None,
    per_byte: Annotated[bool, typer.Option("--per-byte", help="Bits of every byte as well (--json).")] = False,
    address: options.Address = None,
    config: options.Config = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    as_json: options.Json = False,
) -> None:
    """Measure how well the ensemble predicts a text.

    Bits per byte of the ensemble and of each expert alone; lower is better. A text that is longer than an expert's
    context is scored in rolling windows: every byte once, after as much of the text as fits.

    \b
    Examples:
      token-swarm score --text-file README.md
      token-swarm score --config examples/demo.yaml --text "Paris is in France." --json
    """
    from token_swarm.v1 import swarm_pb2

    if text is not None and text_file is not None:
        raise CliError("--text-file: give it or --text, not both")
    if per_byte and not as_json:
        raise CliError("--per-byte: is for --json only")
    request = swarm_pb2.ScoreRequest(
        prompt=options.read_text("--prompt", prompt),
        text=options.read_text("--text-file" if text_file else "--text", text, text_file),
        chat=chat,
        per_byte=per_byte,
        stride=stride,
        **options.mixing_fields(weights, particle, rule),
    )
    credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)

    check_mixing(config, weights, particle)

    async def call(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> Any:
        return await stub.Score(request)

    response = session.with_server(address, config, call, credentials)
    options.warn_of_plain_experts(response.without_chat_template)
    report = _report(response, per_byte=per_byte)
    if as_json:
        print(json.dumps(report))
    else:
        from rich.console import Console

        from token_swarm_server.cli.report import score_table

        console = Console()
        console.print(score_table(report))
        if report["windows"]:
            console.print(_windows_line(report), highlight=False, soft_wrap=True)


def _windows_line(report: dict[str, Any]) -> str:
    """How a text that outgrew a context was scored."""
    first, *later = report["windows"]
    least = min(own["context_bytes"] for own in later)
    return (
        f"{report['bytes']:,} bytes in {1 + len(later)} windows: the first of {first['bytes']:,} bytes, then a stride "
        f"of {report['stride']:,} (--stride), each after at least {least:,} bytes of the text"
    )


def _report(response: swarm_pb2.ScoreResponse, *, per_byte: bool) -> dict[str, Any]:
    """The answer in bits. token_level: of the expert's own tokens. retired: probability that was left out."""

    def bits(nats: float) -> float:
        return -nats / (math.log(2) * response.bytes)

    report: dict[str, Any] = {
        "bytes": response.bytes,
        "bits_per_byte": {
            "ensemble": bits(response.log_prob),
            "experts": {each.expert: bits(each.log_prob) for each in response.experts},
        },
        "token_level": {"experts": {each.expert: bits(each.token_log_prob) for each in response.experts}},
        "tokens": {each.expert: each.tokens for each in response.experts},
        "retired": response.retired,
        "stride": response.stride or None,
        "windows": [
            {"start": own.start, "bytes": own.bytes, "context_bytes": own.context_bytes} for own in response.windows
        ],
    }
    if per_byte:
        report["per_byte"] = {
            "ensemble": [-nats / math.log(2) for nats in response.byte_log_probs],
            "experts": {
                each.expert: [-nats / math.log(2) for nats in each.byte_log_probs] for each in response.experts
            },
        }
    return report
