"""Time of one step between two processes, for each transport: `python -m bench.transport`.

The expert's logits are ready before it is asked, so what is left is the way there and back: messages, copies
and wake-ups. Both transports are measured in turn, so that other work on the machine burdens both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from token_swarm_server.benchmark.tables import Table
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.expert_server.server import serve

from bench.common import give
from token_swarm.experts.contract import EncodedPrompt, ExpertSpec, ExpertStats, Extend, Op, Open, Rows, StepResult
from token_swarm.v1 import expert_pb2
from token_swarm.vocabulary import Vocabulary

TRANSPORTS = {
    "shared memory": expert_pb2.TRANSPORT_SHARED_MEMORY,
    "inline": expert_pb2.TRANSPORT_INLINE,
}
ROUNDS = 20


class _Instant:
    """An expert that returns `rows` fixed logit rows without computing anything."""

    def __init__(self, width: int, rows: int) -> None:
        table = (None, *(str(token).encode() for token in range(1, width)))
        self.spec = ExpertSpec("instant", "none", Vocabulary(table, (0,)), "none", 2**20, 8, torch.float32)
        self._logits = torch.randn(rows, width)  # [rows, width]

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """Not asked for here."""
        raise NotImplementedError

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Not asked for here."""
        raise NotImplementedError

    def step(self, ops: Sequence[Op]) -> StepResult:
        """All rows, for the only operation."""
        rows = len(self._logits) if isinstance(ops[0], Open | Extend) else 0
        return StepResult(self._logits[:rows], ((0, rows),), (None,))

    def stats(self) -> ExpertStats:
        """Nothing is held."""
        return ExpertStats(0, 0, 0)

    def close(self) -> None:
        """Nothing to free."""


async def _measure(connections: dict[str, ExpertConnection], rows: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, by transport."""
    op = Extend(0, (1,) * rows, Rows.ALL)
    seconds: dict[str, list[float]] = {name: [] for name in connections}
    for round_ in range(ROUNDS + 1):
        for name, connection in connections.items():
            for _ in range(max(1, steps // ROUNDS)):
                started = time.perf_counter()
                await connection.step([op])
                if round_:  # The first round warms up.
                    seconds[name].append(time.perf_counter() - started)
    return seconds


async def run(width: int, rows: int, steps: int) -> list[dict[str, Any]]:
    """One row a transport: what a step of `rows` logit rows takes."""
    with tempfile.TemporaryDirectory() as directory:
        expert = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.transport", "--expert", f"unix:{directory}/expert",
            "--width", str(width), "--rows", str(rows), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            if expert.stdout is None or not (address := (await expert.stdout.readline()).decode().strip()):
                raise RuntimeError("the expert's process did not start")
            async with contextlib.AsyncExitStack() as stack:
                connections = {}
                for name, prefer in TRANSPORTS.items():
                    connections[name] = await ExpertConnection.connect(
                        address, "instant", cache=Path(directory), prefer=prefer
                    )
                    stack.push_async_callback(connections[name].close)
                seconds = await _measure(connections, rows, steps)
        finally:
            expert.terminate()
            await expert.wait()
    size, found = rows * width * 4, []
    for name, times in seconds.items():
        median, p90 = statistics.median(times), statistics.quantiles(times, n=10)[-1]
        figures = {"median_us": median * 1e6, "p90_us": p90 * 1e6, "mb_per_s": size / median / 1e6}
        found.append({"transport": name, "width": width, "rows": rows, "bytes": size, **figures})
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=262_144, help="width of a logit row (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="steps per transport (default %(default)s)")
    parser.add_argument("--expert", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.expert:
        instant = _Instant(options.width, options.rows)
        asyncio.run(serve(instant, options.expert, on_ready=lambda address: print(address, flush=True)))
    else:
        found = asyncio.run(run(options.width, options.rows, options.steps))
        table = Table(
            f"Steps of {options.rows} x {options.width} float32 logits, {options.steps} of each transport",
            ("transport", "median us", "p90 us", "MB/s"),
        )
        for row in found:
            table.rows.append((row["transport"], *(f"{row[key]:,.0f}" for key in ("median_us", "p90_us", "mb_per_s"))))
        give("transport", {"steps": options.steps, "rows": found}, [table], as_json=options.json)


if __name__ == "__main__":
    main()
