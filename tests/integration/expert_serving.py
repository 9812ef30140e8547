"""A toy expert behind gRPC and connections to it, as the tests of expert servers use them."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.expert_server.server import ExpertServer

from token_swarm.experts.contract import StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.v1 import expert_pb2
from token_swarm.vocabulary import Vocabulary

VOCABULARY = Vocabulary((None, b"a", b"b", b"c", b"ab", b"ab", b"abc", b"abca", b"ca", None), eos_ids=(0,))
SHM = Path("/dev/shm")
TRANSPORTS = {"inline": expert_pb2.TRANSPORT_INLINE, "shared memory": expert_pb2.TRANSPORT_SHARED_MEMORY}
every_transport = pytest.mark.parametrize("prefer", TRANSPORTS.values(), ids=TRANSPORTS.keys())
torch.set_num_threads(1)


def toy():
    return ToyExpert("toy", VOCABULARY, seed=3, max_sequences=5, max_context=50)


class Watched(ToyExpert):
    """Shows what it holds and was asked; `gate` holds steps up and `broken` makes one fail."""

    def __init__(self, **options):
        super().__init__("toy", VOCABULARY, max_sequences=64, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.steps = []
        self.broken = False
        self.closed = False

    @property
    def held(self):
        return set(self._held)

    def step(self, ops):
        self.entered.set()
        self.gate.wait(10)
        self.steps.append(list(ops))
        if self.broken:
            self.broken = False
            raise RuntimeError("a secret of the model")
        return super().step(ops)

    def close(self):
        self.closed = True
        super().close()


class Writing(ToyExpert):
    """Puts its rows into the memory that it is given."""

    def __init__(self):
        super().__init__("toy", VOCABULARY, max_sequences=64)
        self.placed = 0

    def step_into(self, ops, memory):
        result = self.step(ops)
        logits = memory(len(result.logits) + 2)[: len(result.logits)]
        logits[:] = result.logits
        self.placed += len(logits)
        return StepResult(logits, result.spans, result.errors)


@asynccontextmanager
async def serving(expert, tmp_path, **options):
    server = ExpertServer(expert, f"unix:{tmp_path}/run/expert", **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server, tmp_path, prefer=expert_pb2.TRANSPORT_UNSPECIFIED):
    connection = await ExpertConnection.connect(
        server.address, "toy", cache=tmp_path / "cache", prefer=prefer, wait_seconds=10
    )
    try:
        yield connection
    finally:
        await connection.close()


async def eventually(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
