"""Streams under cancels, deadlines, bad requests and SIGKILL for its experts: `python -m bench soak --minutes 30`.

A real `token-swarm serve` writes every greedy text undisturbed first. Then the storm: each stream is a client that
sends one random request after the other, and every `--kill-every` seconds a random expert is killed. At the end: no
stream hung, every greedy text that came to its end is the undisturbed one, and nothing is held that was not held
before: KV, admission, shared memory, file descriptors, memory. Anything else is a line of `problems`, exit code 1.

Memory is compared within the life of a process, from `--warm` seconds after it took work; an expert that was killed
before it lived twice as long is not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.common import DEMO_EXPERTS, print_facts, print_json
from bench.soaking.processes import Processes, eventually
from bench.soaking.traffic import Traffic, summary
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

START_SECONDS = 300.0
STOP_SECONDS = 60.0
SETTLE_SECONDS = 30.0
# A server that loads for minutes would otherwise be found minutes late.
_CHANNEL = (("grpc.max_reconnect_backoff_ms", 1000),)
# A connection more or less that gRPC keeps for a moment.
SPARE_DESCRIPTORS = 2


@dataclass
class Findings:
    """What was measured besides the requests."""

    kills: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)
    descriptors: dict[str, tuple[int, int]] = field(default_factory=dict)
    growth: dict[str, list[float]] = field(default_factory=dict)
    exit_code: int | None = None


@asynccontextmanager
async def server(options: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[Process, str]]:
    """`token-swarm serve` over the models, and its address; killed at the end if it still runs."""
    models = parse_models(options.models)
    document = {
        "experts": {
            name: {
                "model": str(path),
                "dtype": "float32",
                "threads": 1,
                "max_context": options.max_context,
                "max_sequences": 2 * options.streams,
            }
            for name, path in models.items()
        },
        "coordinator": {"listen": f"unix:{folder}/swarm.sock", "drain_seconds": 5.0},
        "cache": str(folder / "cache"),
    }
    config = folder / "swarm.yaml"
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    command = (sys.executable, "-m", "token_swarm_server.cli", "serve", "--config", str(config))
    with (folder / "serve.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield process, f"unix:{folder}/swarm.sock"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def parse_models(text: str | None) -> dict[str, Path]:
    """`NAME=DIRECTORY,...`; by default the demo experts."""
    if text is None:
        return {name: Path(".cache/experts").absolute() / name for name in DEMO_EXPERTS}
    return {name: Path(path) for name, _, path in (part.partition("=") for part in text.split(","))}


async def answers(stub: Any, process: Process, log: Path) -> None:
    """Wait until the server serves. Raises RuntimeError with its last words when it does not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.returncode is None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.ListExperts(swarm_pb2.ListExpertsRequest(), timeout=2)
            return
        await asyncio.sleep(0.2)
    said = await asyncio.to_thread(log.read_text, errors="replace")
    raise RuntimeError(f"the server did not start: {said[-400:]}")


async def held(stub: Any) -> dict[str, int]:
    """What the server says it holds: everything is 0 once no request is under way."""
    status = await stub.GetStatus(swarm_pb2.GetStatusRequest(), timeout=10)
    found = {"running": status.requests.running, "waiting": status.requests.waiting}
    for expert in status.experts:
        found[f"KV sequences of {expert.expert}"] = expert.kv_sequences if expert.HasField("kv_sequences") else -1
        found[f"calls queued for {expert.expert}"] = expert.queued
    return found


async def settle(stub: Any) -> dict[str, int]:
    """What is still held after `SETTLE_SECONDS`, or nothing."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        found = {name: count for name, count in (await held(stub)).items() if count}
        if not found or time.monotonic() > end:
            return found
        await asyncio.sleep(0.2)


async def killer(
    options: argparse.Namespace, stub: Any, processes: Processes, findings: Findings, problems: list[str]
) -> None:
    """Kill a random expert every `kill_every` seconds and see it come back, until cancelled."""
    dice = random.Random(options.seed)
    while True:
        await asyncio.sleep(options.kill_every)
        if (name := processes.kill_one(dice)) is None:
            problems.append("kill: no expert lives")
            continue
        findings.kills.append(name)
        killed = time.monotonic()
        while True:
            # At first the coordinator may not know yet; a new process with a new connection counts as a restart.
            experts = (await stub.ListExperts(swarm_pb2.ListExpertsRequest(), timeout=10)).experts
            (one,) = [each for each in experts if each.name == name]
            if one.state == swarm_pb2.EXPERT_STATE_READY and one.restarts >= findings.kills.count(name):
                findings.recoveries.append(time.monotonic() - killed)
                processes.takes_work(name)
                break
            if time.monotonic() > killed + options.patience:
                problems.append(f"kill: {name} did not come back within {options.patience:g} s: {one.reason}")
                break
            await asyncio.sleep(0.2)


async def storm(
    options: argparse.Namespace, stub: Any, traffic: Traffic, processes: Processes, findings: Findings
) -> None:
    """Warm up, see what is held at rest, let everything loose, and see it again."""
    problems = traffic.tally.problems
    running = asyncio.Event()

    async def load(seconds: float, what: str, *, first: int) -> None:
        running.set()
        clients = [asyncio.create_task(traffic.stream(first + n, running)) for n in range(options.streams)]
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
        )
        with Progress(*columns, console=Console(file=sys.stderr), disable=options.json) as progress:
            bar = progress.add_task(what, total=seconds, said="")
            end = time.monotonic() + seconds
            while (left := end - time.monotonic()) > 0:
                counts = (
                    f"{traffic.tally.ended.total()} requests, {len(findings.kills)} kills, {len(problems)} problems"
                )
                progress.update(bar, completed=seconds - left, said=counts)
                await asyncio.sleep(min(1.0, left))
        running.clear()
        await asyncio.gather(*clients)

    await load(options.warm, "warm-up", first=0)
    if left := await settle(stub):
        problems.append(f"leak: after the warm-up {left}")
    processes.look()
    before = processes.server.descriptors[-1]
    killing = asyncio.create_task(killer(options, stub, processes, findings, problems))
    await load(60 * options.minutes - options.warm, "storm", first=options.streams)
    killing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await killing
    await check_rest(stub, processes, findings, problems, before)


async def check_rest(stub: Any, processes: Processes, findings: Findings, problems: list[str], before: int) -> None:
    """After the storm nothing is held that was not held before it."""
    ready = swarm_pb2.EXPERT_STATE_READY
    end = time.monotonic() + START_SECONDS
    while True:
        experts = (await stub.ListExperts(swarm_pb2.ListExpertsRequest(), timeout=10)).experts
        if all(each.state == ready for each in experts) or time.monotonic() > end:
            break
        await asyncio.sleep(0.2)
    problems += [f"down: {each.name} is not back: {each.reason}" for each in experts if each.state != ready]
    findings.restarts = {each.name: each.restarts for each in experts}
    if sum(findings.restarts.values()) != len(findings.kills):
        problems.append(f"restarts: {findings.restarts} after {len(findings.kills)} kills")
    if left := await settle(stub):
        problems.append(f"leak: {left} after {SETTLE_SECONDS:g} s without requests")
    if not await eventually(lambda: processes.mapped_segments() == len(experts), 10):
        problems.append(f"leak: {processes.mapped_segments()} segments mapped for {len(experts)} experts")
    if not await eventually(lambda: not processes.segments_left(), 10):
        problems.append(f"leak: names in /dev/shm: {', '.join(sorted(processes.segments_left()))}")
    processes.look()
    after = processes.server.descriptors[-1]
    findings.descriptors["coordinator"] = (before, after)
    if after > before + SPARE_DESCRIPTORS:
        problems.append(f"leak: {before} file descriptors of the coordinator became {after}")
    for life in processes.experts():
        if life.descriptors:
            first, last = life.descriptors[0], life.descriptors[-1]
            findings.descriptors[life.name] = (first, last)
            if last > first + SPARE_DESCRIPTORS:
                problems.append(f"leak: {first} file descriptors of {life.name} became {last}")


async def soak(options: argparse.Namespace) -> tuple[Traffic, Findings]:
    """Run everything."""
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="token-swarm-soak-") as name:
        folder = Path(name)
        async with (
            server(options, folder) as (process, address),
            grpc.aio.insecure_channel(address, options=_CHANNEL) as channel,
        ):
            stub: Any = swarm_pb2_grpc.SwarmServiceStub(channel)
            await answers(stub, process, folder / "serve.log")
            processes = Processes(process.pid)
            for life in processes.experts():
                processes.takes_work(life.name)
            watching = asyncio.create_task(processes.watch(options.look_every))
            traffic = Traffic(
                stub,
                seed=options.seed,
                max_bytes=options.max_bytes,
                prompts=options.prompts,
                patience=options.patience,
            )
            problems = traffic.tally.problems
            await traffic.refer(options.streams)
            await storm(options, stub, traffic, processes, findings)
            watching.cancel()
            findings.growth = dict(processes.growth(options.warm))
            for name, shares in findings.growth.items():
                if max(shares) > options.memory_growth:
                    problems.append(f"leak: memory of {name} grew by {max(shares):.1%}")
            experts = [life.process for life in processes.lives.values()]
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                findings.exit_code = await asyncio.wait_for(process.wait(), STOP_SECONDS)
            if findings.exit_code != 0:
                problems.append(f"stop: exit code {findings.exit_code} after SIGTERM")
            if not await eventually(lambda: not any(each.is_running() for each in experts), 10):
                problems.append("stop: experts outlive their server")
    return traffic, findings


def document(options: argparse.Namespace, traffic: Traffic, findings: Findings) -> dict[str, Any]:
    """Everything, for a machine."""
    tally = traffic.tally
    return {
        "minutes": options.minutes,
        "streams": options.streams,
        "requests": dict(sorted(tally.ended.items())),
        "bytes": tally.bytes,
        "greedy texts compared": tally.compared,
        "of these, an expert died meanwhile": tally.survived,
        "kills": findings.kills,
        "seconds until an expert was back": [round(seconds, 1) for seconds in findings.recoveries],
        "restarts": findings.restarts,
        "file descriptors before and after": findings.descriptors,
        "memory growth": {name: [round(share, 4) for share in shares] for name, shares in findings.growth.items()},
        "exit code": findings.exit_code,
        "problems": tally.problems,
    }


def table(found: Mapping[str, Any]) -> Table:
    """The same for people."""
    rows = Table("soak", "", title=f"{found['minutes']:g} minutes, {found['streams']} streams")
    for kind, outcomes in summary(found["requests"]):
        rows.add_row(f"requests: {kind}", outcomes)
    back = found["seconds until an expert was back"]
    rows.add_row("bytes written", f"{found['bytes']:,}")
    rows.add_row("greedy texts compared", str(found["greedy texts compared"]))
    rows.add_row("of these, an expert died meanwhile", str(found["of these, an expert died meanwhile"]))
    rows.add_row("kills", f"{len(found['kills'])}, back after {min(back):g} to {max(back):g} s" if back else "none")
    for name, (before, after) in found["file descriptors before and after"].items():
        rows.add_row(f"file descriptors: {name}", f"{before} before, {after} after")
    for name, shares in found["memory growth"].items():
        rows.add_row(f"memory growth: {name}", ", ".join(f"{share:+.2%}" for share in shares))
    rows.add_row("problems", "\n".join(found["problems"][:20]) or "none")
    return rows


def main() -> None:
    """Soak, print, and exit with 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of requests, the warm-up included")
    parser.add_argument("--warm", type=float, default=60.0, help="seconds of requests without kills, then of each life")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=120.0, help="seconds between two kills")
    parser.add_argument("--models", help="NAME=DIRECTORY,...; default: the demo experts")
    parser.add_argument("--max-bytes", type=int, default=100, help="length of a text")
    parser.add_argument("--max-context", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--prompts", type=int, default=12, help="different greedy texts")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds without a message: a stream hangs")
    parser.add_argument("--memory-growth", type=float, default=0.02, help="most that memory may grow, as a share")
    parser.add_argument("--look-every", type=float, default=2.0, help="seconds between two looks at the processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.warm >= 60 * options.minutes:
        parser.error(f"--warm: {options.warm:g} s is not allowed; it must be less than --minutes")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    found = document(options, *asyncio.run(soak(options)))
    if options.json:
        print_json("soak", found)
    else:
        print_facts()
        Console().print(table(found))
    if found["problems"]:
        print(f"error: {len(found['problems'])} problems: {found['problems'][0]}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
