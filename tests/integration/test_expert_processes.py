"""Experts and callers as processes of their own: killed, and stopped by SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest
import torch
from token_swarm_server.coordinator.expert.connection import ExpertConnection
from token_swarm_server.coordinator.loop import ExpertScheduler
from token_swarm_server.rpc.errors import ExpertUnavailable

from tests.integration.expert_serving import SHM, Watched, eventually, serving, toy
from token_swarm.experts.contract import Close, Extend, Open, OpErrorKind
from token_swarm.v1 import expert_pb2

PROCESS = """
import asyncio, sys, time
from pathlib import Path
from token_swarm.experts.toy import ToyExpert
from token_swarm.vocabulary import Vocabulary
from token_swarm_server.expert_server.server import serve

class Slow(ToyExpert):
    def step(self, ops):
        time.sleep(float(sys.argv[3]))
        return super().step(ops)

table = (None, b"a", b"b", b"c", b"ab", b"ab", b"abc", b"abca", b"ca", None)
expert = Slow("toy", Vocabulary(table, (0,)), seed=3)
asyncio.run(serve(expert, sys.argv[1], directory=Path(sys.argv[2]), on_ready=lambda at: print(at, flush=True)))
"""

CALLER = """
import asyncio, sys
from pathlib import Path
from token_swarm.experts.contract import Open
from token_swarm_server.coordinator.expert.connection import ExpertConnection

async def main():
    connection = await ExpertConnection.connect(sys.argv[1], "toy", cache=Path(sys.argv[2]))
    await connection.step([Open(0, (1,))])
    print(connection.transport, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@asynccontextmanager
async def process(script, *arguments):
    """A Python process, once it has printed its first line."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        line = await asyncio.wait_for(started.stdout.readline(), 60)
        yield started, line.decode().strip()
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


@pytest.fixture
def shared(tmp_path):
    """A directory of this test's own in shared memory."""
    directory = SHM / f"test-{os.getpid()}-{tmp_path.name}"
    directory.mkdir()
    yield directory
    left = list(directory.iterdir())
    for path in left:
        path.unlink()
    directory.rmdir()
    assert not left


async def test_a_killed_expert_fails_its_callers_and_leaves_no_file(tmp_path, shared):
    async with process(PROCESS, f"unix:{tmp_path}/run/expert", shared, 0.5) as (expert, address):
        connection = await ExpertConnection.connect(address, "toy", cache=tmp_path / "cache")
        assert connection.transport == expert_pb2.TRANSPORT_SHARED_MEMORY
        assert not list(shared.iterdir())
        scheduler = ExpertScheduler(connection)
        sequence = scheduler.allocate_sequence()
        (rows,) = await scheduler.submit([Open(sequence, (1, 2))])
        assert torch.equal(rows[0], toy().law((1, 2)))
        running = asyncio.ensure_future(scheduler.submit([Extend(sequence, (3,))]))
        await asyncio.sleep(0.1)
        waiting = asyncio.ensure_future(scheduler.submit([Extend(sequence, (1,))]))
        await asyncio.sleep(0.01)
        expert.send_signal(signal.SIGKILL)
        for task in (running, waiting):
            with pytest.raises(ExpertUnavailable, match="'toy'"):
                await asyncio.wait_for(task, 10)
        with pytest.raises(ExpertUnavailable):
            await scheduler.submit([Close(sequence)])
        scheduler.release([sequence])
        await asyncio.wait_for(connection.wait_lost(), 10)
        await scheduler.close()
        await connection.close()
        assert not list(shared.iterdir())
    async with process(PROCESS, address, shared, 0) as (expert, _):
        again = await ExpertConnection.connect(address, "toy", cache=tmp_path / "cache")
        assert (await again.step([Extend(sequence, (3,))])).errors[0].kind is OpErrorKind.UNKNOWN_SEQUENCE
        await again.close()


async def test_a_killed_caller_frees_its_sequences_and_leaves_no_file(tmp_path, shared):
    expert = Watched()
    async with serving(expert, tmp_path, directory=shared) as server:
        async with process(CALLER, server.address, tmp_path / "cache") as (caller, line):
            assert int(line) == expert_pb2.TRANSPORT_SHARED_MEMORY
            assert expert.held == {0}
            assert not list(shared.iterdir())
            caller.send_signal(signal.SIGKILL)
            await eventually(lambda: not expert.held)
        assert not list(shared.iterdir())


async def test_sigterm_stops_an_expert_that_has_callers(tmp_path, shared):
    async with process(PROCESS, f"unix:{tmp_path}/run/expert", shared, 0) as (expert, address):
        connection = await ExpertConnection.connect(address, "toy", cache=tmp_path / "cache")
        await connection.step([Open(0, (1,))])
        expert.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(expert.wait(), 10) == 0
        with pytest.raises(ExpertUnavailable):
            await asyncio.wait_for(connection.step([Extend(0, (1,))]), 10)
        await connection.close()
