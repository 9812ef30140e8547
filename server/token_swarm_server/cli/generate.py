"""`token-swarm generate`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm_server.cli import options, session
from token_swarm_server.cli.mixing_checks import check_mixing

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

_UINT32 = 2**32 - 1


def generate(
    prompt: Annotated[str | None, typer.Option(help="Text to continue; default: standard input.")] = None,
    chat: options.Chat = False,
    weights: options.Weights = None,
    particle: options.ParticleName = None,
    rule: options.RuleOption = None,
    unit: options.UnitOption = options.UnitName.AUTO,
    temperature: Annotated[float | None, typer.Option(help="Below 0.001 greedy, at most 100; default: 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the K best tokens.", min=1, max=_UINT32)] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the best tokens of mass P.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least P times the best.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.", min=0, max=options.UINT64)] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Most bytes to write.", min=1, max=options.UINT64)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to write.", min=1, max=options.UINT64)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; repeatable.")] = None,
    epsilon: options.Epsilon = None,
    draft_tokens: options.DraftTokens = None,
    address: options.Address = None,
    config: options.Config = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with the ensemble.

    The text streams to standard output; a table of what each expert did follows on standard error.

    \b
    Examples:
      token-swarm generate --prompt "The capital of France is" --max-bytes 100
      token-swarm generate --prompt "Why is the sky blue?" --chat --weights smollm2=0.7,qwen2.5-coder=0.3
      token-swarm generate --config examples/demo.yaml --prompt "Once upon a time"
    """
    from token_swarm.v1 import swarm_pb2

    check_mixing(config, weights, particle)
    sampling = swarm_pb2.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    request = swarm_pb2.GenerateRequest(
        prompt=options.read_text("--prompt", prompt),
        chat=chat,
        sampling=sampling,
        max_bytes=max_bytes,
        max_tokens=max_tokens,
        stop=[options.read_text("--stop", each) for each in stop or ()],
        epsilon=epsilon,
        draft_tokens=draft_tokens,
        unit=swarm_pb2.Unit.Value(f"UNIT_{unit.name}"),
        **options.mixing_fields(weights, particle, rule),
    )
    credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        write_text(text)

    async def call(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> swarm_pb2.Finish:
        from token_swarm_server.cli.client import stream_text

        return await stream_text(stub, request, pieces.append if as_json else show)

    try:
        finish = session.with_server(address, config, call, credentials)
    except BaseException:
        if pieces and not as_json:
            end_line()
        raise
    if as_json:
        print_json("".join(pieces), finish)
    else:
        print_summary(finish)
    options.warn_of_plain_experts(finish.without_chat_template)


def write_text(text: str) -> None:
    """Write a piece at once, in UTF-8 whatever the locale is."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def end_line() -> None:
    """End the line of the text where a person reads it; what is piped stays the text to the byte."""
    if sys.stdout.isatty():
        print(flush=True)


def print_json(text: str, finish: swarm_pb2.Finish) -> None:
    """One object: the text and every field of the final message."""
    from token_swarm_server.cli.client import plain

    document: dict[str, Any] = {"text": text, **plain(finish)}
    print(json.dumps(document))


def print_summary(finish: swarm_pb2.Finish) -> None:
    """The table of what each expert did; the text before it ends its line first, where a person reads it."""
    from token_swarm_server.cli.report import finish_line, finish_table

    end_line()
    console = session.stderr_console()
    console.print(finish_line(finish), soft_wrap=True, highlight=False)
    console.print(finish_table(finish))
