"""`token-swarm expert`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from token_swarm.experts.registry import check_backend, parse_options
from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import CliError
from token_swarm_server.cli.serve import require_free
from token_swarm_server.config.places import default_cache
from token_swarm_server.config.settings import EXPERT_NAME, ExpertSettings, ServerTls, Settings
from token_swarm_server.telemetry.logs import configure_warnings


def expert(
    name: Annotated[str, typer.Argument(help="What weights call the expert.")],
    model: Annotated[str, typer.Option(help="Directory, Hugging Face id, or demo:NAME.")],
    address: Annotated[str, typer.Option(help="Where to listen: host:port or unix:/path.")] = "127.0.0.1:50071",
    backend: Annotated[
        str, typer.Option(help="What runs the model: transformers, vllm, or one of another distribution.")
    ] = "transformers",
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Option of the backend's own, of vllm see docs/vllm.md; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the model; default: torch's choice.")] = None,
    max_sequences: Annotated[int, typer.Option(help="Sequences in the KV cache.")] = 16,
    max_context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    cache: options.Cache = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Encrypt; the certificate to show to coordinators.", metavar="PEM")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of that certificate.", metavar="PEM")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="Take only coordinators with a certificate from these authorities.", metavar="PEM"),
    ] = None,
    tls_client_name: Annotated[
        list[str] | None, typer.Option(help="Of these, only those with this name in it; repeatable.", metavar="NAME")
    ] = None,
    allow_insecure: Annotated[
        bool, typer.Option("--allow-insecure", help="Let other machines in without encryption or certificates.")
    ] = False,
    stop_when_input_ends: Annotated[
        bool, typer.Option("--stop-when-input-ends", help="Stop when standard input is closed.", hidden=True)
    ] = False,
) -> None:
    """Run one expert alone.

    A configuration reaches it by its `address`.

    \b
    Example:
      token-swarm expert smollm2 --model demo:smollm2 --address 127.0.0.1:50071
      token-swarm expert smollm2 --model demo:smollm2 --address 0.0.0.0:50071 \\
        --tls-certificate expert.pem --tls-key expert.key --tls-client-ca swarm-ca.pem
    """
    from token_swarm_server.expert_server.process import ExpertStartError, run_expert
    from token_swarm_server.expert_server.process import stop_when_input_ends as stop_with

    configure_warnings()
    if stop_when_input_ends:
        stop_with()
    if not re.fullmatch(EXPERT_NAME, name):
        raise CliError(f"NAME: {name!r} is not a valid expert name; it must match {EXPERT_NAME}")
    try:
        arguments = parse_options(engine or [])
        check_backend(backend, arguments)
    except ValueError as error:
        raise CliError(f"--{error}") from error
    try:
        settings = ExpertSettings.model_validate(
            {
                "model": model,
                "backend": backend,
                "engine": arguments,
                "device": device,
                "dtype": dtype,
                "threads": threads,
                "max_sequences": max_sequences,
                "max_context": max_context,
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        flag = str(problem["loc"][0]).replace("_", "-")
        raise CliError(f"--{flag}: {problem['msg']} (is {problem['input']!r})") from error
    from token_swarm_server.rpc.host import Access

    tls = _tls(tls_certificate, tls_key, tls_client_ca, tls_client_name or [])
    access = Access(tls, allow_insecure=allow_insecure, tls_prefix="--tls-")
    access.require_usable(address, "--address")
    require_free(address, "--address")
    console = session.stderr_console()
    alone = Settings.model_construct(experts={name: settings}, cache=cache or default_cache())
    models = session.ready_models(alone, console)

    def ready(bound: str) -> None:
        console.print(f"expert {name} is ready on {bound}", markup=False, highlight=False)

    try:
        run_expert(name, models[name], settings, address, access=access, on_ready=ready)
    except ExpertStartError as error:
        raise CliError(str(error)) from error


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None, names: list[str]) -> ServerTls | None:
    """What the flags say. Raises CliError."""
    if certificate is None and key is None and client_ca is None and not names:
        return None
    if certificate is None or key is None:
        raise CliError("--tls-certificate: give it and --tls-key, or no --tls flag at all")
    if names and client_ca is None:
        raise CliError("--tls-client-name: needs --tls-client-ca, without which nobody shows a certificate")
    return ServerTls(certificate=certificate, key=key, client_ca=client_ca, client_names=names)
