"""A coordinator and two toy experts over real gRPC that can be killed, started again and made to misbehave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import torch
from token_swarm_server.config.loading import load_settings
from token_swarm_server.coordinator.engine import Engine
from token_swarm_server.coordinator.server import CoordinatorServer
from token_swarm_server.expert_server.server import ExpertServer

from tests.laws.ensembles import LONG, NESTED
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.contract import StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture
from token_swarm.v1 import swarm_pb2, swarm_pb2_grpc
from token_swarm.vocabulary import Vocabulary

GREEDY = swarm_pb2.Sampling(temperature=0)
# Without an end-of-text token: greedy texts run to their limit.
ENDLESS = {
    "e0": Vocabulary((*NESTED.token_bytes[:6], None), ()),
    "e1": Vocabulary(LONG.token_bytes[:9], ()),
}
# Sure of itself, as models are: few tokenizations matter.
LIKE_A_MODEL: Any = {"order": 4, "sharpness": 6.0, "max_context": 400}


class Frail(ToyExpert):
    """A toy that takes its time, and misbehaves once `mischief` is set: at the next step that returns logits.

    bad_after: says after which tokens its logits are NaN.
    """

    def __init__(self, name: str, vocabulary: Vocabulary, seed: int) -> None:
        super().__init__(name, vocabulary, **LIKE_A_MODEL, seed=seed)
        self.mischief: Callable[[StepResult], StepResult] | None = None
        self.bad_after: Callable[[tuple[int, ...]], bool] = lambda tokens: False
        self.steps = 0
        self.seconds = 0.001

    def law(self, tokens: tuple[int, ...]) -> torch.Tensor:
        logits = super().law(tokens)
        return torch.full_like(logits, torch.nan) if self.bad_after(tokens) else logits

    def step(self, ops: Any) -> StepResult:
        time.sleep(self.seconds)
        result = super().step(ops)
        self.steps += 1
        if self.mischief is not None and len(result.logits):
            mischief, self.mischief = self.mischief, None
            return mischief(result)
        return result


class Single(Frail):
    """One whose logits are float32, as those of models are: the fast kernels mix them."""

    def __init__(self, name: str, vocabulary: Vocabulary, seed: int) -> None:
        super().__init__(name, vocabulary, seed)
        self._spec = replace(self._spec, dtype=torch.float32)

    def step(self, ops: Any) -> StepResult:
        result = super().step(ops)
        return StepResult(result.logits.float(), result.spans, result.errors)


class Swarm:
    """Two experts that can be killed and started again at their addresses, and a coordinator."""

    def __init__(self, tmp_path: Path, options: dict[str, Any]) -> None:
        self._kind: type[Frail] = options.pop("kind", Frail)
        self.experts: dict[str, Frail] = {}
        self.servers: dict[str, ExpertServer] = {}
        self.revived: list[tuple[str, str]] = []
        step_seconds = options.pop("step_seconds", 30)
        self.settings = load_settings(
            None,
            experts={
                name: {"address": f"unix:{tmp_path}/{name}.sock", "step_seconds": step_seconds} for name in ENDLESS
            },
            coordinator={"listen": "127.0.0.1:0", **options},
            cache=tmp_path / "cache",
        )
        self.engine: Engine
        self.server: CoordinatorServer
        self.stub: Any
        self.address = ""
        self._revivals: set[asyncio.Task[None]] = set()

    async def start(self, name: str) -> None:
        expert = self._kind(name, ENDLESS[name], seed=list(ENDLESS).index(name) + 1)
        server = ExpertServer(expert, str(self.settings.experts[name].address))
        await server.start()
        self.experts[name], self.servers[name] = expert, server

    async def kill(self, name: str) -> None:
        await self.servers.pop(name).stop()

    def restart(self, name: str, reason: str) -> None:
        """As the launcher: a new process takes the place of one that is at fault."""
        self.revived.append((name, reason))
        task = asyncio.create_task(self._restart(name))
        self._revivals.add(task)

    async def _restart(self, name: str) -> None:
        if name in self.servers:
            await self.kill(name)
            await self.start(name)

    def trouble(self, name: str) -> str | None:
        return None if name in self.servers else "its process was ended by signal 9"

    async def nothing_held(self) -> None:
        """Wait until nobody holds anything: the leak counter is zero."""
        async with asyncio.timeout(10):
            while True:
                stats = [await link.stats() for link in self.engine.links.values()]
                if not any(own.sequences or own.tokens for own in stats) and not self.engine.running:
                    break
                await asyncio.sleep(0.01)
        for name, count in self.engine.admission.sequences.items():
            assert self.engine.admission.free(name) == count
        assert self.engine.admission.waiting == 0

    async def text(self, prompt: str, **fields: Any) -> tuple[str, swarm_pb2.Finish]:
        fields = {"sampling": GREEDY, "max_bytes": 120} | fields
        text = ""
        async for message in self.stub.Generate(swarm_pb2.GenerateRequest(prompt=prompt, **fields), timeout=30):
            if message.HasField("finish"):
                return text, message.finish
            text += message.chunk.text
        raise AssertionError("the stream ended without a finish")


@asynccontextmanager
async def swarm(tmp_path: Path, **options: Any) -> AsyncIterator[Swarm]:
    running = Swarm(tmp_path, options)
    for name in ENDLESS:
        await running.start(name)
    endpoints = {name: str(expert.address) for name, expert in running.settings.experts.items()}
    running.engine = await Engine.connect(endpoints, running.settings, reviver=running)
    server = CoordinatorServer(running.settings, running.engine)
    await server.start()
    running.server, running.address = server, server.address
    async with grpc.aio.insecure_channel(server.address) as channel:
        running.stub = swarm_pb2_grpc.SwarmServiceStub(channel)
        try:
            yield running
        finally:
            await server.stop(0)
            for expert_server in list(running.servers.values()):
                await expert_server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def undisturbed(prompt: str, max_bytes: int = 120) -> str:
    toys = {name: ToyExpert(name, ENDLESS[name], **LIKE_A_MODEL, seed=i + 1) for i, name in enumerate(ENDLESS)}
    local = LocalEnsemble(toys)
    request = DecodeRequest(sampling=Sampling(temperature=0.0), max_bytes=max_bytes)
    return local.generate(prompt, Mixture({"e0": 0.5, "e1": 0.5}), request)[0]
