"""What a long prompt does to texts that are being written beside it: `python -m bench stall --help`.

Streams are written in turns with nobody beside them and with a long prompt arriving in the middle; the gaps between two
pieces of their text are compared. With `--chunks` the whole is done for several sizes of the pieces that a prompt is
read in (`prefill_chunk`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
from token_swarm_server.benchmark.client import Failure, Sample, measure
from token_swarm_server.benchmark.own_server import own_server
from token_swarm_server.benchmark.prompts import prompt
from token_swarm_server.benchmark.tables import Table
from token_swarm_server.cli.client import connect
from token_swarm_server.config.loading import load_settings
from token_swarm_server.config.settings import ENV_PREFIX

from bench.common import give
from token_swarm.v1 import swarm_pb2

GREEDY = swarm_pb2.Sampling(temperature=0)
PERCENTILES = (50, 90, 99, 100)


def sample_of(answer: Sample | Failure) -> Sample:
    """Raises RuntimeError for a request that failed."""
    if isinstance(answer, Failure):
        raise RuntimeError(f"{answer.code}: {answer.details}")
    return answer


async def write(stub: Any, streams: int, max_bytes: int, long_prompt: str | None) -> tuple[list[float], Sample | None]:
    """Gaps of `streams` texts in ms, and the request that came into the middle of them."""
    requests = [
        swarm_pb2.GenerateRequest(prompt=prompt(64, seed), max_bytes=max_bytes, sampling=GREEDY)
        for seed in range(streams)
    ]
    texts = [asyncio.create_task(measure(stub, request)) for request in requests]
    late = None
    if long_prompt is not None:
        await asyncio.sleep(2)
        request = swarm_pb2.GenerateRequest(prompt=long_prompt, max_bytes=2, sampling=GREEDY)
        late = sample_of(await measure(stub, request))
    samples = [sample_of(await text) for text in texts]
    return [1000 * gap for sample in samples for gap in sample.gaps], late


async def serve(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a chunk size."""
    rows = []
    names = load_settings(options.config).experts
    for chunk in options.chunks or [None]:
        if chunk is not None:
            os.environ |= {f"{ENV_PREFIX}EXPERTS__{name.upper()}__PREFILL_CHUNK": str(chunk) for name in names}
        calm: list[float] = []
        crowded: list[float] = []
        reading = []
        async with own_server(options.config) as address, connect(address) as stub:
            await write(stub, 1, 32, None)
            for number in range(options.rounds):
                calm += (await write(stub, options.streams, options.max_bytes, None))[0]
                own, late = await write(
                    stub, options.streams, options.max_bytes, prompt(options.prompt_bytes, seed=100 + number)
                )
                crowded += own
                if late is not None and late.first is not None:
                    reading.append(late.first)
        rows.append(
            {
                "chunk": chunk,
                "calm_ms": dict(zip(PERCENTILES, np.percentile(calm, PERCENTILES).tolist(), strict=True)),
                "crowded_ms": dict(zip(PERCENTILES, np.percentile(crowded, PERCENTILES).tolist(), strict=True)),
                "worst_over_median": max(crowded) / float(np.median(crowded)),
                "raised_by_medians": (max(crowded) - max(calm)) / float(np.median(calm)),
                "long_prompt_first_byte_seconds": float(np.median(reading)),
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("bench/pair.yaml"))
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--max-bytes", type=int, default=200, help="of each stream")
    parser.add_argument("--prompt-bytes", type=int, default=4000, help="of the prompt that arrives")
    parser.add_argument("--chunks", type=int, nargs="+", help="prefill_chunk to try (default: the configuration's)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = asyncio.run(serve(options))
    table = Table(
        "Gaps between two pieces of text, ms",
        ("chunk", "beside it", *(f"p{p}" for p in PERCENTILES), "worst / median", "first byte of the long prompt"),
    )
    for row in rows:
        shown = "default" if row["chunk"] is None else str(row["chunk"])
        table.rows.append((shown, "nobody", *(f"{row['calm_ms'][p]:.0f}" for p in PERCENTILES), "", ""))
        beside = [f"{row['crowded_ms'][p]:.0f}" for p in PERCENTILES]
        reading = f"{row['long_prompt_first_byte_seconds']:.1f} s"
        table.rows.append((shown, "long prompt", *beside, f"{row['worst_over_median']:.1f}", reading))
    give("stall", {"rows": rows}, [table], as_json=options.json)


if __name__ == "__main__":
    main()
