"""How a coordinator stops and reloads: over real gRPC, with toy experts, and as a real process."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from tests.integration.frail_swarm import Swarm, swarm, until
from token_swarm.particle import Mixture, Particle
from token_swarm.v1 import swarm_pb2


async def stopping(running: Swarm, grace: float) -> asyncio.Task[None]:
    task = asyncio.create_task(running.server.stop(grace))
    await asyncio.sleep(0.02)
    return task


async def test_running_texts_end_and_new_ones_are_sent_elsewhere(tmp_path: Path) -> None:
    async with swarm(tmp_path, lanes_per_expert=16) as running, grpc.aio.insecure_channel(running.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        # Somebody watches the health and never hangs up; one text runs, another one waits for KV.
        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        texts = [asyncio.create_task(running.text(prompt, max_bytes=300)) for prompt in ("ab", "cab")]
        await until(lambda: running.engine.running == 1 and running.engine.admission.waiting == 1)
        stop = await stopping(running, 30)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.text("ab")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        status: Any = rpc_status.from_call(caught.value)
        assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        assert not stop.done()
        for text in texts:
            assert (await text)[1].bytes == 300
        ended = time.perf_counter()
        await stop
        assert time.perf_counter() - ended < 5


async def test_grace_has_an_end_and_can_be_cut_short(tmp_path: Path) -> None:
    for grace, hurried in ((0.2, False), (60.0, True)):
        async with swarm(tmp_path) as running:
            text = asyncio.create_task(_long(running))
            await until(lambda running=running: running.engine.running == 1)  # type: ignore[misc]
            stop = await stopping(running, grace)
            if hurried:
                running.server.hurry()
            await asyncio.wait_for(stop, 10)
            with pytest.raises(grpc.aio.AioRpcError):
                await text
            for expert in running.experts.values():
                await until(lambda expert=expert: not expert._held)  # type: ignore[misc]


async def _long(running: Swarm) -> None:
    for _ in range(1000):
        await running.text("ab", max_bytes=390)


async def test_particles_are_read_again_without_dropping_a_text(tmp_path: Path) -> None:
    folder = tmp_path / "particles"
    folder.mkdir()

    def save(name: str) -> None:
        Particle(name, Mixture({"e0": 0.4, "e1": 0.6})).save(folder / f"{name}.json")

    save("first")
    async with swarm(tmp_path, particles=str(folder)) as running:
        text = asyncio.create_task(running.text("ab", particle="first", max_bytes=300))
        await until(lambda: running.engine.running == 1)
        save("second")
        (folder / "first.json").unlink()
        running.server.reload()
        assert await names(running) == ["second"]
        assert (await text)[1].bytes == 300
        (folder / "broken.json").write_text("{")
        running.server.reload()
        assert await names(running) == ["second"]


async def names(running: Swarm) -> list[str]:
    listed = await running.stub.ListParticles(swarm_pb2.ListParticlesRequest())
    return [particle.name for particle in listed.particles]
