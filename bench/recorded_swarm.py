"""A real server over experts that can run their forwards again, without it: the ensemble and its floor."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from token_swarm_server.benchmark.load import Load, Stretch, run_load
from token_swarm_server.benchmark.own_server import own_server
from token_swarm_server.cli.client import connect

from bench.rivals.child import Child, ChildError
from token_swarm.v1 import swarm_pb2

# What the coordinator has not told the experts yet when a client has its last byte: that the text's KV is free.
_SETTLE_SECONDS = 0.3


class Swarm:
    """A real server over recording experts, and the pipes to tell them to replay."""

    def __init__(self, stub: Any, recorders: Mapping[str, Child]) -> None:
        self._stub = stub
        self.recorders = recorders

    @classmethod
    @asynccontextmanager
    async def start(cls, models: Mapping[str, Path], coordinator: Mapping[str, Any]) -> AsyncIterator[Swarm]:
        """Start the experts, one thread each, and `token-swarm serve` before them."""
        with tempfile.TemporaryDirectory(prefix="token-swarm-bench-") as folder, contextlib.ExitStack() as stack:
            recorders = {}
            for name, path in models.items():
                command = (sys.executable, "-m", "bench.rivals.recording_expert", "--name", name)
                arguments = ("--model", str(path), "--listen", f"unix:{folder}/{name}.sock")
                recorders[name] = Child(name, (*command, *arguments), threads=1)
                stack.callback(recorders[name].close)
            addresses = {name: {"address": child.receive()["address"]} for name, child in recorders.items()}
            config = Path(folder) / "swarm.yaml"
            document = {"experts": addresses, "coordinator": dict(coordinator), "cache": f"{folder}/cache"}
            config.write_text(yaml.safe_dump(document), encoding="utf-8")
            async with own_server(config) as address, connect(address) as stub:
                yield cls(stub, recorders)

    async def write(self, load: Load, requests: Sequence[swarm_pb2.GenerateRequest]) -> Stretch:
        """Send requests; every one must be answered. Raises ChildError."""
        stretch = await run_load(self._stub, load, requests, seed=0)
        if stretch.failures:
            failure = stretch.failures[0]
            raise ChildError(f"server: {failure.code} {failure.details}")
        return stretch

    async def forwards(self) -> dict[str, float]:
        """Seconds that each expert has computed so far."""
        status = await self._stub.GetStatus(swarm_pb2.GetStatusRequest())
        return {expert.expert: expert.compute_seconds for expert in status.experts}

    def record(self) -> None:
        """Forget the steps so far."""
        for child in self.recorders.values():
            child.call(do="start")

    async def floor(self) -> float:
        """Seconds until every expert has run its recorded forwards again, all at the same time."""
        await asyncio.sleep(_SETTLE_SECONDS)
        for child in self.recorders.values():
            child.send(do="replay")
        replays = [await asyncio.to_thread(child.receive) for child in self.recorders.values()]
        return max(float(replay["seconds"]) for replay in replays)
