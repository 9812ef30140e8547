"""`token-swarm demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from token_swarm_server.cli import options, session
from token_swarm_server.cli.generate import print_summary, write_text
from token_swarm_server.config.loading import load_settings

if TYPE_CHECKING:
    from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc

PROMPT = "The Great Barrier Reef is the largest living structure on Earth. It"


def demo(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    max_bytes: Annotated[int, typer.Option(help="Most bytes to write.", min=1, max=2**32)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Same seed, same text.", min=0, max=2**63)] = 1,
    cache: Annotated[Path, typer.Option(help="Where models are kept.")] = Path(".cache"),
) -> None:
    """Write a text with two small models as one.

    Starts them, writes, stops them. The first run fetches and converts SmolLM2-135M-Instruct and Gemma 3 270M
    (about 0.4 GB); later ones take seconds.

    \b
    Example:
      token-swarm demo --prompt "Once upon a time" --temperature 0.8 --seed 7
    """
    from token_swarm.v1 import swarm_pb2

    settings = load_settings(
        experts={"smollm2": {"model": "demo:smollm2"}, "gemma3": {"model": "demo:gemma3"}}, cache=cache
    )
    prompt = options.read_text("--prompt", prompt)
    request = swarm_pb2.GenerateRequest(
        prompt=prompt,
        sampling=swarm_pb2.Sampling(temperature=temperature, seed=seed),
        max_bytes=max_bytes,
    )

    async def call(stub: swarm_pb2_grpc.SwarmServiceAsyncStub) -> swarm_pb2.Finish:
        from token_swarm_server.cli.client import stream_text

        write_text(prompt)
        return await stream_text(stub, request, write_text)

    finish = session.with_own_server(settings, call)
    if not sys.stdout.isatty():
        write_text("\n")
    print_summary(finish)
