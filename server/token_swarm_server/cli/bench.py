"""`token-swarm bench`: latency and load of a server."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm_server.cli import options, session
from token_swarm_server.cli.errors import BAD_INPUT, FAILURE, CliError, Group
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import DEFAULT_LISTEN

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2_grpc
    from token_swarm_server.benchmark.plan import Plan
    from token_swarm_server.benchmark.tables import Table

bench = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a server: latency of one stream, or many streams at once.\n\n"
    "Both measure each expert alone through the same server as well, in turns, and print the ratio.",
)

Alone = Annotated[bool, typer.Option("--alone/--no-alone", help="Measure each expert alone as well.")]
Rounds = Annotated[int, typer.Option(help="Times that everything is measured, in turns.", min=1)]
Seed = Annotated[int, typer.Option(help="Chooses prompts, arrivals and draws.", min=0, max=2**64 - 1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy: the same work every time.", min=0)]
Text = Annotated[
    Path | None, typer.Option(help="UTF-8 text to cut the prompts from.  [default: one of its own]", metavar="FILE")
]
Save = Annotated[Path | None, typer.Option(help="Write the JSON to this file too.", metavar="FILE")]


@bench.command()
def latency(
    prompt_bytes: Annotated[str, typer.Option(help="Lengths of the prompts.", metavar="N,...")] = "32,512,2048",
    max_bytes: Annotated[int, typer.Option(help="Bytes of text to write.", min=2)] = 256,
    rounds: Rounds = 3,
    alone: Alone = True,
    weights: options.Weights = None,
    particle: options.ParticleName = None,
    rule: options.RuleOption = None,
    unit: options.UnitOption = options.UnitName.AUTO,
    temperature: Temperature = 0.0,
    epsilon: options.Epsilon = None,
    draft_tokens: options.DraftTokens = None,
    seed: Seed = 0,
    text_file: Text = None,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    config: options.Config = None,
    save: Save = None,
    as_json: options.Json = False,
) -> None:
    """Time one warm stream, and say where the time goes.

    Time to the first byte, time per byte and per token of each expert's own tokenizer, and every part of it: the
    experts' forwards, waiting for the slowest, transport, mixing, the byte walk, scheduling, gRPC.

    \b
    Examples:
      token-swarm bench latency --config examples/demo.yaml
      token-swarm bench latency --address 127.0.0.1:50061 --prompt-bytes 128 --json
    """
    from token_swarm_server.benchmark.latency import measure_latency
    from token_swarm_server.benchmark.tables import breakdown_table, latency_table

    credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
    mixing = options.mixing_fields(weights, particle, rule)
    lengths = _numbers("--prompt-bytes", prompt_bytes, int)
    plans = [
        _plan(length, max_bytes, mixing, unit, temperature, epsilon, draft_tokens, text_file) for length in lengths
    ]

    async def call(stub: swarm_pb2_grpc.SwarmServiceAsyncStub, experts: list[str]) -> dict[str, Any]:
        # Without an expert beside it there is nothing to compare with.
        both = alone and len(experts) > 1
        turns = len(plans) * (1 + len(experts) * both) * (rounds + 1)
        with _progress("latency", turns) as step:
            return await measure_latency(stub, plans, experts, alone=both, rounds=rounds, seed=seed, done=step)

    def tables(report: dict[str, Any]) -> list[Table | None]:
        return [
            latency_table(report),
            *(breakdown_table(row) for row in report["rows"] if row["mixture"] == "ensemble"),
        ]

    _run("latency", address, config, call, tables, credentials, save=save, as_json=as_json)


@bench.command()
def load(
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: numbers of streams.  [default: 1,4,8]", metavar="N,...")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests a second, arriving at random (Poisson).", metavar="R,...")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests of each round.  [default: 4 a stream]", min=1)
    ] = None,
    prompt_bytes: Annotated[int, typer.Option(help="Length of the prompts.", min=1)] = 128,
    max_bytes: Annotated[int, typer.Option(help="Bytes of text to write.", min=2)] = 128,
    goodput: Annotated[
        str | None,
        typer.Option(
            help="Count requests a second within bounds in ms: ttft, tpot (a byte), e2el.", metavar="NAME:MS,..."
        ),
    ] = None,
    rounds: Rounds = 3,
    alone: Alone = True,
    weights: options.Weights = None,
    particle: options.ParticleName = None,
    rule: options.RuleOption = None,
    unit: options.UnitOption = options.UnitName.AUTO,
    temperature: Temperature = 0.0,
    epsilon: options.Epsilon = None,
    draft_tokens: options.DraftTokens = None,
    seed: Seed = 0,
    text_file: Text = None,
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    config: options.Config = None,
    save: Save = None,
    as_json: options.Json = False,
) -> None:
    """Time many streams at once.

    In the words of vLLM's serving benchmark: TTFT, TPOT, ITL and E2EL (mean, median, p99), throughput and goodput.

    \b
    Examples:
      token-swarm bench load --config examples/demo.yaml --concurrency 1,8
      token-swarm bench load --rate 0.5,1 --goodput ttft:2000,tpot:100
    """
    from token_swarm_server.benchmark.load import Load, parse_bounds
    from token_swarm_server.benchmark.sweep import measure_load, turns
    from token_swarm_server.benchmark.tables import load_table

    if concurrency is None and rate is None:
        concurrency = "1,4,8"
    loads = [Load(concurrency=number) for number in _numbers("--concurrency", concurrency, int)]
    loads += [Load(rate=number) for number in _numbers("--rate", rate, float)]
    bounds = parse_bounds(goodput) if goodput else {}
    credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
    mixing = options.mixing_fields(weights, particle, rule)
    plan = _plan(prompt_bytes, max_bytes, mixing, unit, temperature, epsilon, draft_tokens, text_file)

    async def call(stub: swarm_pb2_grpc.SwarmServiceAsyncStub, experts: list[str]) -> dict[str, Any]:
        both = alone and len(experts) > 1
        count = turns(plan, loads, experts, alone=both, requests=requests, rounds=rounds)
        with _progress("load", count) as step:
            return await measure_load(
                stub, plan, loads, experts, alone=both, requests=requests, rounds=rounds, seed=seed, bounds=bounds,
                done=step,
            )  # fmt: skip

    _run("load", address, config, call, lambda report: [load_table(report)], credentials, save=save, as_json=as_json)


def _run(
    name: str,
    address: str | None,
    config: Path | None,
    call: Callable[[swarm_pb2_grpc.SwarmServiceAsyncStub, list[str]], Awaitable[dict[str, Any]]],
    tables: Callable[[dict[str, Any]], list[Table | None]],
    credentials: options.Credentials,
    *,
    save: Path | None,
    as_json: bool,
) -> None:
    """Measure with `call` and print: JSON, or tables with what they depend on above them."""
    from token_swarm.v1 import swarm_pb2
    from token_swarm_server.benchmark.facts import config_facts, describe, expert_facts, machine_facts
    from token_swarm_server.benchmark.own_server import ServerNotStarted, own_server
    from token_swarm_server.cli.client import connect

    if config is not None and address is not None:
        raise CliError("--address: leave it out, --config starts a server of its own")
    if save is not None:
        _require_writable(save)
    settings = load_settings(config) if config else None
    if settings is not None:
        # A download here shows its progress; the server's would not.
        session.ready_models(settings, session.stderr_console())

    async def on_server(target: str, credentials: options.Credentials) -> dict[str, Any]:
        async with connect(target, credentials) as stub:
            listed: Any = await stub.ListExperts(swarm_pb2.ListExpertsRequest())
            experts = expert_facts(listed.experts)
            measured = await call(stub, list(experts))
        return {"benchmark": name, "facts": facts, "config": described, "experts": experts, **measured}

    async def main() -> dict[str, Any]:
        if config is None:
            return await on_server(address or DEFAULT_LISTEN, credentials)
        try:
            async with own_server(config) as target:
                return await on_server(target, options.PLAIN)
        except ServerNotStarted as error:
            raise CliError(str(error), BAD_INPUT if error.code == BAD_INPUT else FAILURE) from error

    facts = machine_facts()
    described = config_facts(settings) if settings else {"address": address or DEFAULT_LISTEN}
    report = session.run(main())
    if save is not None:
        save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report))
    else:
        from rich.console import Console

        console = Console()
        console.print(describe(facts), highlight=False)
        for table in tables(report):
            if table is not None:
                console.print(table.rich(console.width))
    _require_answers(report)


def _require_writable(save: Path) -> None:
    """Make the file's folder. Raises CliError now for a file that could not be written when all is measured."""
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"--save: {save} cannot be written: {error.strerror}") from error
    if save.is_dir() or not os.access(save if save.exists() else save.parent, os.W_OK):
        raise CliError(f"--save: {save} cannot be written: {'Is a directory' if save.is_dir() else 'no permission'}")


def _require_answers(report: dict[str, Any]) -> None:
    """A benchmark in which nothing was answered has failed. Raises CliError."""
    failed = {code: count for row in report["rows"] for code, count in row["failed"].items()}
    if not any(row["requests"] for row in report["rows"]):
        raise CliError(f"no request was answered: {failed}", FAILURE)


def _plan(
    prompt_bytes: int,
    max_bytes: int,
    mixing: dict[str, Any],
    unit: options.UnitName,
    temperature: float,
    epsilon: float | None,
    draft_tokens: int | None,
    text_file: Path | None,
) -> Plan:
    from token_swarm.v1 import swarm_pb2
    from token_swarm_server.benchmark.plan import Plan
    from token_swarm_server.benchmark.prompts import PASSAGE

    return Plan(
        prompt_bytes=prompt_bytes,
        max_bytes=max_bytes,
        mixing=mixing,
        unit=swarm_pb2.Unit.Value(f"UNIT_{unit.name}"),
        epsilon=epsilon,
        draft_tokens=draft_tokens,
        temperature=temperature,
        text=options.read_text("--text-file", None, text_file) if text_file else PASSAGE,
    )


def _numbers(option: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    """`1,2,4` as positive numbers. Raises CliError."""
    try:
        numbers = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [0]
    if any(not 0 < number < float("inf") for number in numbers):
        raise CliError(f"{option}: {text!r} is not a list of positive numbers such as 1,4,8")
    return numbers


def _progress(name: str, total: int) -> Any:
    """A bar on standard error; gives what is to be called after each of `total` requests."""
    from contextlib import contextmanager

    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("requests"), TimeElapsedColumn())
        with Progress(*columns, console=session.stderr_console(), transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda: progress.advance(task)

    return bar()
