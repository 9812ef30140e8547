"""The ensemble beside its floor, its experts alone and its rivals, in turns: `python -m bench compare --help`.

Every contestant takes a turn in every round, on the same prompts and the same cores, one core an expert; a ratio is the
median over the rounds of that round's ratio, so that what drifts cancels. The ensemble and its floor take two turns a
round.

floor: the forwards that the ensemble ran in the same round, run again by the same experts at the same time, without a
coordinator (bench/rivals/recording_expert.py). own forwards: those forwards themselves, as the expert that took longer
for them clocked them while the texts were written. None of these drafts; "with drafts" is the ensemble as it is served
when nobody says otherwise. alone: one expert through the same server. generate: `model.generate`, one thread. lockstep:
the ensemble of GaC and UniTE, one thread a model or both threads one model after the other. genlm: genlm-bytes on one
expert, one thread or all, three texts of a few bytes after prompts of at most 24; on both: on all experts at the same
time, one thread each, the slower one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from token_swarm_server.benchmark.load import Load
from token_swarm_server.benchmark.plan import ENSEMBLE, Plan
from token_swarm_server.benchmark.statistics import Spread
from token_swarm_server.benchmark.tables import Table

from bench.common import DEMO_EXPERTS, give, show
from bench.recorded_swarm import Swarm
from bench.rivals.child import Child, ChildError
from token_swarm.cores import available_cores
from token_swarm.v1 import swarm_pb2

GENLM_PYTHON = Path(".venv-genlm/bin/python")
TARGETS = {
    "ensemble / floor, 1 stream": ("at most", 1.15),
    "ensemble / floor, 8 streams": ("at most", 1.15),
    "ensemble / slower expert alone, 1 stream": ("at most", 1.25),
    "genlm on both / ensemble": ("at least", 5.0),
    "genlm gemma3 / ensemble": ("at least", 5.0),
    "genlm smollm2 / ensemble": ("at least", 5.0),
    "lockstep / ensemble": ("at least", 1.5),
}
DRAFTING = f"{ENSEMBLE} with drafts"
GENLM_PAIR = "genlm on both"
GENLM_PROMPT = 24
"""Bytes of its prompt at most."""
LOCKSTEP = ("lockstep, a thread each", "lockstep, in turn")
_FLOOR_TURNS = 2
"""In a round."""
_GENLM_TEXTS = 3
"""In a turn."""


@dataclass
class Round:
    """Milliseconds per byte of every contestant. wall: of everything, prompts included; else after the first piece."""

    per_byte: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)


async def swarm_turn(
    swarm: Swarm, found: Round, plan: Plan, experts: Sequence[str], *, streams: int, texts: int, seed: int
) -> None:
    """The ensemble with its floor, and each expert alone, under one load."""
    load = Load(concurrency=streams)
    for name, fields in plan.mixtures(experts, alone=True).items():
        requests = [plan.request(fields, seed + number) for number in range(texts)]
        if name == ENSEMBLE:
            await _floor_turn(swarm, found, experts, load, requests)
            continue
        stretch = await swarm.write(load, requests)
        found.per_byte[f"alone {name}, {load}"] = stretch.ms_per_byte
        found.wall[f"alone {name}, {load}"] = 1000 / stretch.bytes_per_second


async def _floor_turn(
    swarm: Swarm,
    found: Round,
    experts: Sequence[str],
    load: Load,
    requests: Sequence[swarm_pb2.GenerateRequest],
) -> None:
    """The ensemble and its floor, twice in turns: either takes a few seconds, in which a machine can have a mood."""
    per_byte, written = 0.0, 0
    seconds = dict.fromkeys((ENSEMBLE, "own forwards", "floor"), 0.0)
    for _ in range(_FLOOR_TURNS):
        swarm.record()
        before = await swarm.forwards()
        stretch = await swarm.write(load, requests)
        after = await swarm.forwards()
        per_byte += stretch.ms_per_byte / _FLOOR_TURNS
        written += stretch.length
        seconds[ENSEMBLE] += stretch.seconds
        seconds["own forwards"] += max(after[name] - before[name] for name in experts)
        seconds["floor"] += await swarm.floor()
    found.per_byte[f"{ENSEMBLE}, {load}"] = per_byte
    found.wall |= {f"{name}, {load}": 1000 * taken / written for name, taken in seconds.items()}


async def draft_turn(swarm: Swarm, found: Round, plan: Plan, *, texts: int, seed: int) -> None:
    """The ensemble, one text after the other, with as many drafts as the server allows."""
    plan = replace(plan, draft_tokens=None)
    requests = [plan.request({}, seed + number) for number in range(texts)]
    found.per_byte[DRAFTING] = (await swarm.write(Load(concurrency=1), requests)).ms_per_byte


async def rival_turn(
    child: Child, found: Round, plan: Plan, *, texts: int, seed: int, **jobs: Mapping[str, Any]
) -> None:
    """One rival's jobs, by the name of the contestant."""
    for key, job in jobs.items():
        seconds, written = 0.0, 0
        for number in range(texts):
            prompt = plan.request({}, seed + number).prompt
            answer = await asyncio.to_thread(child.call, **job, prompt=prompt, max_bytes=plan.max_bytes)
            if answer["rest"]:
                seconds += answer["total"] - answer["first"]
                written += answer["rest"]
        if written:
            found.per_byte[key] = 1000 * seconds / written


async def plain_turn(child: Child, plan: Plan, experts: Sequence[str], texts: int, found: Round, seed: int) -> None:
    """What bench/rivals/plain.py can do."""
    cores = len(available_cores())
    jobs = {
        **{f"generate {name}": {"do": "generate", "model": name, "threads": 1} for name in experts},
        LOCKSTEP[0]: {"do": "lockstep", "parallel": True, "threads": 1},
        LOCKSTEP[1]: {"do": "lockstep", "parallel": False, "threads": cores},
    }
    await rival_turn(child, found, plan, texts=texts, seed=seed, **jobs)


async def genlm_turn(name: str, child: Child, plan: Plan, threads: dict[str, int], found: Round, seed: int) -> None:
    """genlm-bytes with one thread or all, whichever was faster in its first turn; `threads` remembers."""
    tried: dict[int, float] = {}
    for count in [threads[name]] if name in threads else sorted({1, len(available_cores())}):
        await rival_turn(child, found, plan, texts=_GENLM_TEXTS, seed=seed, **{name: {"threads": count}})
        tried[count] = found.per_byte[name]
    threads[name] = min(tried, key=tried.__getitem__)


async def genlm_pair_turn(children: Sequence[Child], plan: Plan, found: Round, seed: int) -> None:
    """genlm-bytes on every expert at the same time, one thread each: a mixture of their laws waits for the slowest."""
    pairs = [Round() for _ in children]
    jobs: dict[str, Mapping[str, Any]] = {GENLM_PAIR: {"threads": 1}}
    await asyncio.gather(
        *(
            rival_turn(child, own, plan, texts=_GENLM_TEXTS, seed=seed, **jobs)
            for child, own in zip(children, pairs, strict=True)
        )
    )
    if all(GENLM_PAIR in own.per_byte for own in pairs):
        found.per_byte[GENLM_PAIR] = max(own.per_byte[GENLM_PAIR] for own in pairs)


async def compare(options: argparse.Namespace, say: Callable[[str], object]) -> dict[str, Any]:
    """All rounds; figures and ratios for JSON."""
    models = {name: options.models / name for name in options.experts}
    experts, cores = list(models), len(available_cores())
    plan = Plan(options.prompt_bytes, options.max_bytes, draft_tokens=0)
    # It is slow, also at reading: fewer bytes after a short prompt.
    short = Plan(min(GENLM_PROMPT, plan.prompt_bytes), options.genlm_bytes)
    rounds: list[Round] = []
    threads: dict[str, int] = {}
    weights = dict.fromkeys(experts, 1 / len(experts))
    with contextlib.ExitStack() as stack:
        rivals = dict(_rivals(options, models, cores, stack))
        turns: dict[str, Callable[[Round, int], Awaitable[None]]] = {
            name: partial(plain_turn, child, plan, experts, options.texts)
            if name == "plain"
            else partial(genlm_turn, name, child, short, threads)
            for name, child in rivals.items()
        }
        async with Swarm.start(models, {"rule": "log-linear", "weights": weights}) as swarm:
            for number in range(options.rounds + 1):
                found, seed = Round(), 1000 * number
                for streams in options.streams:
                    texts = max(options.texts, streams)
                    await swarm_turn(swarm, found, plan, experts, streams=streams, texts=texts, seed=seed)
                await draft_turn(swarm, found, plan, texts=options.texts, seed=seed)
                for name in list(rivals):
                    try:
                        await turns[name](found, seed)
                    except ChildError as error:
                        say(f"left out from here on: {error}")
                        del rivals[name]
                pair = [child for name, child in rivals.items() if name.startswith("genlm")]
                if len(pair) == len(experts):
                    # One that ends here says so in its own next turn.
                    with contextlib.suppress(ChildError):
                        await genlm_pair_turn(pair, short, found, seed)
                # The first round warms up.
                if number:
                    rounds.append(found)
                say(f"round {number} of {options.rounds}" + ("" if number else " (warms up)"))
    return {
        "prompt_bytes": plan.prompt_bytes,
        "max_bytes": plan.max_bytes,
        "texts": options.texts,
        "genlm_threads": threads,
        "rounds": [{"per_byte": each.per_byte, "wall": each.wall} for each in rounds],
        **figures(rounds, experts, options.streams),
    }


def _rivals(
    options: argparse.Namespace, models: Mapping[str, Path], cores: int, stack: contextlib.ExitStack
) -> Iterator[tuple[str, Child]]:
    """Start those that were asked for and can be had; say which cannot."""
    if "plain" in options.rivals:
        paths = json.dumps({name: str(path) for name, path in models.items()})
        yield "plain", _child(stack, "plain", (sys.executable, "-m", "bench.rivals.plain", "--models", paths), cores)
    if "genlm" in options.rivals:
        if not options.genlm_python.exists():
            print(
                f"genlm-bytes is left out: {options.genlm_python} does not exist; `make genlm` makes it",
                file=sys.stderr,
            )
            return
        program = str(Path(__file__).parent / "rivals" / "genlm_bytes.py")
        for name, path in models.items():
            command = (str(options.genlm_python), program, "--model", str(path))
            yield f"genlm {name}", _child(stack, f"genlm {name}", command, cores)


def _child(stack: contextlib.ExitStack, name: str, command: Sequence[str], threads: int) -> Child:
    child = Child(name, command, threads=threads)
    stack.callback(child.close)
    child.receive()
    return child


def round_ratios(found: Round, experts: Sequence[str], streams: Sequence[int]) -> dict[str, float]:
    """One round's ratios, of those contestants that took part."""
    per_byte, wall, one = found.per_byte, found.wall, f"{ENSEMBLE}, {Load(concurrency=1)}"
    ratios: dict[str, float] = {}
    for load in (str(Load(concurrency=count)) for count in streams):
        own = f"{ENSEMBLE}, {load}"
        slower = max(per_byte[f"alone {name}, {load}"] for name in experts)
        ratios[f"ensemble / floor, {load}"] = wall[own] / wall[f"floor, {load}"]
        ratios[f"ensemble / own forwards, {load}"] = wall[own] / wall[f"own forwards, {load}"]
        ratios[f"ensemble / slower expert alone, {load}"] = per_byte[own] / slower
    if DRAFTING in per_byte:
        ratios[f"{DRAFTING} / without"] = per_byte[DRAFTING] / per_byte[one]
    rivals = {
        f"{GENLM_PAIR} / ensemble": (GENLM_PAIR, one),
        f"{GENLM_PAIR} / {DRAFTING}": (GENLM_PAIR, DRAFTING),
    }
    for name in experts:
        rivals |= {
            f"generate {name} / alone": (f"generate {name}", f"alone {name}, {Load(concurrency=1)}"),
            f"genlm {name} / alone": (f"genlm {name}", f"alone {name}, {Load(concurrency=1)}"),
            f"genlm {name} / ensemble": (f"genlm {name}", one),
            f"genlm {name} / {DRAFTING}": (f"genlm {name}", DRAFTING),
        }
    for label, (above, below) in rivals.items():
        if above in per_byte and below in per_byte:
            ratios[label] = per_byte[above] / per_byte[below]
    ways = [per_byte[way] for way in LOCKSTEP if way in per_byte]
    if ways and one in per_byte:
        # The faster of its two ways, round by round.
        ratios["lockstep / ensemble"] = min(ways) / per_byte[one]
        if DRAFTING in per_byte:
            ratios[f"lockstep / {DRAFTING}"] = min(ways) / per_byte[DRAFTING]
    return ratios


def figures(rounds: Sequence[Round], experts: Sequence[str], streams: Sequence[int]) -> dict[str, Any]:
    """Every contestant's ms per byte and every ratio, over the rounds that have it."""
    return {
        "ms_per_byte": _spreads([found.per_byte for found in rounds]),
        "wall_ms_per_byte": _spreads([found.wall for found in rounds]),
        "ratios": _spreads([round_ratios(found, experts, streams) for found in rounds]),
    }


def _spreads(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    names = list(dict.fromkeys(name for found in rounds for name in found))
    return {name: Spread.of([found[name] for found in rounds if name in found]).plain() for name in names}


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Contestants and ratios."""
    times = Table(
        "ms per byte, median [lowest, highest round]", ("contestant", "after the first piece", "with the prompt")
    )
    for name in {**report["ms_per_byte"], **report["wall_ms_per_byte"]}:
        own = (report[key].get(name) for key in ("ms_per_byte", "wall_ms_per_byte"))
        times.rows.append((name, *("-" if spread is None else show(spread) for spread in own)))
    ratios = Table("Ratios, each round's own", ("ratio", "median [lowest, highest]", "target", "met"))
    for name, spread in report["ratios"].items():
        target = TARGETS.get(name)
        met = "-" if target is None else ("yes" if _met(spread["median"], *target) else "no")
        ratios.rows.append((name, show(spread), "-" if target is None else f"{target[0]} {target[1]:g}", met))
    return [times, ratios]


def _met(value: float, kind: str, bound: float) -> bool:
    return value <= bound if kind == "at most" else value >= bound


def arguments() -> argparse.ArgumentParser:
    """The flags; `bench.report` takes their defaults."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path(".cache/experts"), help="folder of the experts")
    parser.add_argument("--experts", nargs="+", default=list(DEMO_EXPERTS), help="folders in it")
    parser.add_argument("--rivals", nargs="*", default=["plain", "genlm"], choices=("plain", "genlm"))
    parser.add_argument("--genlm-python", type=Path, default=GENLM_PYTHON, help="interpreter that has genlm-bytes")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-bytes", type=int, default=128)
    parser.add_argument("--max-bytes", type=int, default=128)
    parser.add_argument("--genlm-bytes", type=int, default=16, help="bytes that genlm-bytes writes")
    parser.add_argument("--texts", type=int, default=2, help="texts of a turn, at least one a stream")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first, which warms up")
    parser.add_argument("--json", action="store_true")
    return parser


def main() -> None:
    """Measure and print."""
    options = arguments().parse_args()
    console = Console(stderr=True)
    found = asyncio.run(compare(options, lambda text: console.print(text, highlight=False)))
    give("compare", found, tables(found), as_json=options.json)


if __name__ == "__main__":
    main()
