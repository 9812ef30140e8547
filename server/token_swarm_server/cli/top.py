"""`token-swarm top`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from token_swarm_server.cli import options, session

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

_ANSWER_SECONDS = 5.0
_QUIT = "q quits"
_LEGEND = (
    "batch: sequences in a step; tokens/s: tokens read, of prompts and drafts as well; step: mean time of one; busy: "
    f"share of the time in one; seqs: held/fit; KV: share in use. All of the last interval. {_QUIT}; top --help says "
    "more"
)
_STATES = {"ready": "green", "starting": "yellow", "down": "red"}


def top(
    address: options.Address = None,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look at one interval, print it and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per interval.")] = False,
) -> None:
    """Watch a running server: its experts, requests and rates.

    Runs until q or Ctrl-C; where the output is no terminal, for one interval. Rates and times are of the last interval.

    \b
    Times:
      queue           from arrival until a request holds KV on its experts
      first byte      from arrival until its first text
      between chunks  from one piece of text to the next
      whole request   from arrival to the end
    Columns of the experts:
      restarts  how often it came back after it was lost
      queue     calls that wait for its next step
      batch     sequences in one step, mean
      steps/s   steps answered a second
      tokens/s  tokens read a second: of prompts, of texts, and drafted ones
      step      from sending a step to its answer, mean
      busy      share of the time in which a step was under way
      seqs      sequences that it holds, of those that fit
      KV        share of its KV positions in use

    \b
    Examples:
      token-swarm top
      token-swarm top --once
      token-swarm top --json --interval 10 >> load.jsonl
    """
    from rich.console import Console

    console = Console()
    credentials = options.credentials(token_file, tls, tls_ca, tls_certificate, tls_key)
    once = once or not (as_json or console.is_terminal)

    async def watch(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> None:
        if once or as_json:
            async for now in _figures(stub, interval):
                print(json.dumps(now), flush=True) if as_json else console.print(view(now))
                if once:
                    return
        else:
            await _live(console, stub, interval)

    session.with_server(address, None, watch, credentials)


async def _figures(stub: swarm_pb2_grpc.SwarmServiceAsyncStub, interval: float) -> AsyncIterator[dict[str, Any]]:
    """Figures of one interval after the other."""
    from token_swarm_server.cli.rates import rates

    before = await _ask(stub)
    while True:
        await asyncio.sleep(interval)
        now = await _ask(stub)
        yield rates(before, now)
        before = now


async def _ask(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> swarm_pb2.GetStatusResponse:
    from token_swarm.v1 import swarm_pb2

    answer: swarm_pb2.GetStatusResponse = await stub.GetStatus(swarm_pb2.GetStatusRequest(), timeout=_ANSWER_SECONDS)
    return answer


async def _live(console: Console, stub: swarm_pb2_grpc.SwarmServiceAsyncStub, interval: float) -> None:
    """A screen that outlives the server: one that does not answer may come back."""
    import grpc
    from rich.console import Group
    from rich.live import Live

    async def show(live: Live) -> None:
        seen = False
        while True:
            try:
                async for now in _figures(stub, interval):
                    seen = True
                    live.update(Group(view(now), "", _LEGEND), refresh=True)
            except grpc.aio.AioRpcError as error:
                if not seen or error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                live.update(f"the server does not answer; asking again\n\n{_QUIT}", refresh=True)
                await asyncio.sleep(interval)

    first = f"waiting for the first interval\n\n{_QUIT}"
    # Keys first: what is typed as soon as the screen says how to quit must not be lost.
    with _keys() as quit_pressed, Live(first, console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        shown, ended = asyncio.create_task(show(live)), asyncio.create_task(quit_pressed.wait())
        try:
            await asyncio.wait({shown, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not shown.done():
                shown.cancel()
        if shown.done():
            await shown


@contextmanager
def _keys() -> Iterator[asyncio.Event]:
    """An event that q sets from now on, without Enter; on leaving the terminal is what it was."""
    pressed = asyncio.Event()
    if not sys.stdin.isatty():
        yield pressed
        return
    import termios
    import tty

    loop, terminal = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def read() -> None:
        # An end of the input is no reason to stop, and would be read for ever.
        typed = os.read(terminal, 64)
        if not typed:
            loop.remove_reader(terminal)
        elif b"q" in typed.lower():
            pressed.set()

    tty.setcbreak(terminal, termios.TCSADRAIN)
    loop.add_reader(terminal, read)
    try:
        yield pressed
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def view(now: dict[str, Any]) -> RenderableType:
    """The figures for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    requests = now["requests"]
    failed = {name: rate for name, rate in requests["failed_per_second"].items() if rate}
    done = {name: rate for name, rate in requests["succeeded_per_second"].items() if rate}
    state = "draining" if now["draining"] else "serving"
    lines = [
        f"token-swarm {now['version']}, {state}, up {_span(now['uptime_seconds'])}, "
        f"last {now['interval_seconds']:.1f} s",
        f"requests  {requests['running']} running, {requests['waiting']} waiting; per second: "
        f"{requests['received_per_second']:.1f} in, {_named(done)} done, {_named(failed)} failed",
        f"text      {requests['text_bytes_per_second']:,.0f} bytes/s written, "
        f"{requests['prompt_bytes_per_second']:,.0f} read; mixing {requests['mixing_share']:.1%} of the time",
    ]
    times = Table(box=None, pad_edge=False)
    for name in ("", "p50", "p99"):
        times.add_column(name, justify="right" if name else "left")
    for label, key in (
        ("queue", "queue_seconds"),
        ("first byte", "first_byte_seconds"),
        ("between chunks", "inter_chunk_seconds"),
        ("whole request", "total_seconds"),
    ):
        times.add_row(label, *(_seconds(requests[key][share]) for share in ("p50", "p99")))
    experts = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    experts.add_column("expert", overflow="fold")
    experts.add_column("state")
    for name in ("restarts", "queue", "batch", "steps/s", "tokens/s", "step", "busy", "seqs", "KV"):
        experts.add_column(name, justify="right")
    for expert in now["experts"]:
        experts.add_row(
            expert["expert"],
            Text(expert["state"], style=_STATES.get(expert["state"], "")),
            str(expert["restarts"]),
            str(expert["queued"]),
            "-" if expert["batch"] is None else f"{expert['batch']:.1f}",
            f"{expert['steps_per_second']:.1f}",
            f"{expert['tokens_per_second']:.1f}",
            _seconds(expert["step_seconds"]),
            f"{min(expert['busy_share'], 1.0):.0%}",
            f"{_count(expert['kv_sequences'])}/{expert['kv_max_sequences']}",
            _share(expert["kv_tokens"], expert["kv_capacity"]),
        )
    reasons = [Text(f"{e['expert']}: {e['reason']}", style="red") for e in now["experts"] if e["reason"]]
    return Group(*map(Text, lines), Text(), times, Text(), experts, *reasons)


def _named(rates: dict[str, float]) -> str:
    """ "3.0 (max_bytes 2.0, end_of_text 1.0)"."""
    parts = ", ".join(f"{name} {rate:.1f}" for name, rate in sorted(rates.items(), key=lambda item: -item[1]))
    return f"{sum(rates.values()):.1f}" + (f" ({parts})" if parts else "")


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _share(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.1%}" if part is not None and whole else "-"
