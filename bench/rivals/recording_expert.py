"""An expert that remembers its steps and can run them again: `python -m bench.rivals.recording_expert`.

Served as any expert is, it is driven by a real coordinator. Told to replay, it gives the same operations to the same
model once more, one after the other and without a coordinator: the forwards that the ensemble ran, with the same
tokens, positions and batch sizes, and nothing else. What the slower of two experts needs while both replay is the
floor.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from token_swarm_server.expert_server.server import ExpertServer
from transformers.utils import logging

from bench.rivals.child import answer_commands
from token_swarm.experts.contract import (
    EncodedPrompt,
    ExpertSpec,
    ExpertStats,
    Extend,
    Op,
    Open,
    RowMemory,
    StepResult,
)
from token_swarm.experts.transformers.expert import TransformersExpert


class RecordingExpert:
    """Hands everything on to `expert`; keeps the operations of every step since `start`."""

    def __init__(self, expert: TransformersExpert) -> None:
        self._expert = expert
        self._steps: list[tuple[Op, ...]] = []
        self._computing = 0.0

    @property
    def spec(self) -> ExpertSpec:
        """The expert's own."""
        return self._expert.spec

    def encode(self, prompt: str, *, chat: bool = False) -> EncodedPrompt:
        """The expert's own."""
        return self._expert.encode(prompt, chat=chat)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """The expert's own."""
        return self._expert.tokenize(text)

    def step(self, ops: Sequence[Op]) -> StepResult:
        """The expert's own, remembered."""
        return self.step_into(ops, None)

    def step_into(self, ops: Sequence[Op], memory: RowMemory | None) -> StepResult:
        """The expert's own, remembered."""
        self._steps.append(tuple(ops))
        started = time.perf_counter()
        result = self._expert.step_into(ops, memory)
        self._computing += time.perf_counter() - started
        return result

    def stats(self) -> ExpertStats:
        """The expert's own."""
        return self._expert.stats()

    def close(self) -> None:
        """The expert's own."""
        self._expert.close()

    def start(self) -> None:
        """Forget what was recorded."""
        self._steps, self._computing = [], 0.0

    def replay(self) -> dict[str, Any]:
        """Run what was recorded, timed. Every text must have ended, so that its sequences are free again."""
        steps = self._steps
        started = time.perf_counter()
        for ops in steps:
            self._expert.step(ops)
        seconds = time.perf_counter() - started
        tokens = sum(len(op.tokens) for ops in steps for op in ops if isinstance(op, Open | Extend))
        return {"seconds": seconds, "first_time": self._computing, "steps": len(steps), "tokens": tokens}


def main() -> None:
    """Serve one model; answer {"do": "start"} and {"do": "replay"}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", required=True, help="directory or hub id of a causal language model")
    parser.add_argument("--listen", required=True, help="gRPC address")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-sequences", type=int, default=32)
    options = parser.parse_args()
    logging.disable_progress_bar()
    expert = RecordingExpert(
        TransformersExpert(options.name, options.model, threads=options.threads, max_sequences=options.max_sequences)
    )
    loop = asyncio.new_event_loop()

    async def start() -> ExpertServer:
        server = ExpertServer(expert, options.listen)
        await server.start()
        return server

    server = loop.run_until_complete(start())
    serving = threading.Thread(target=loop.run_forever)
    serving.start()

    def handle(command: Mapping[str, Any]) -> Mapping[str, Any]:
        if command["do"] == "replay":
            return expert.replay()
        expert.start()
        return {}

    try:
        answer_commands(handle, address=server.address)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        serving.join()


if __name__ == "__main__":
    main()
