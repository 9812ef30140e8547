"""Processes that end are started again, later and later, and never behind the back of who stops them."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

import pytest
from token_swarm_server.launch.supervisor import ExpertProcess, RestartPolicy

QUICK = RestartPolicy(pause=0.01, deaths=3, window=60.0, open_seconds=0.3)


def test_pauses_double_until_the_breaker_opens() -> None:
    policy = RestartPolicy()
    assert [policy.delay(deaths) for deaths in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 60.0, 60.0, 60.0]
    assert policy.open_seconds < policy.window


def kept(command: str, lines: list[str]) -> ExpertProcess:
    async def spawn() -> Process:
        return await asyncio.create_subprocess_shell(f"exec {command}")

    return ExpertProcess("small", Path("small.log"), spawn, QUICK, lines.append)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_killed_process_comes_back_and_says_why_it_went() -> None:
    lines: list[str] = []
    expert = kept("sleep 60", lines)
    await expert.start()
    expert.watch()
    first = expert.process.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: expert.trouble is not None)
    assert expert.trouble == "its process was ended by signal 9"
    await until(lambda: expert.restarts == 1)
    assert expert.trouble is None
    assert expert.process.pid != first
    expert.kill("no answer to a step within 60 s")
    await until(lambda: expert.restarts == 2)
    assert "no answer to a step within 60 s" in lines[1]
    assert all("see small.log" in line for line in lines)
    last = expert.process
    await expert.stop()
    assert last.returncode is not None
    await asyncio.sleep(0.05)
    assert expert.restarts == 2


async def test_a_process_that_keeps_dying_is_left_alone_for_a_while() -> None:
    lines: list[str] = []
    expert = kept("false", lines)
    await expert.start()
    expert.watch()
    await until(lambda: expert.restarts == 2 and expert.trouble is not None)
    assert expert.trouble == "its process exited with code 1, 3 times of late; the next start is in 0.3 s"
    before = asyncio.get_running_loop().time()
    await until(lambda: expert.restarts == 3)
    assert asyncio.get_running_loop().time() - before > 0.1
    await expert.stop()


async def test_a_process_that_cannot_be_started_again_is_tried_again() -> None:
    lines: list[str] = []
    starts = iter([True, False, True])

    async def spawn() -> Process:
        if not next(starts):
            raise OSError("the interpreter is gone")
        return await asyncio.create_subprocess_shell("exec sleep 60")

    expert = ExpertProcess("small", Path("small.log"), spawn, QUICK, lines.append)
    with pytest.raises(RuntimeError, match="not started"):
        _ = expert.process
    await expert.start()
    expert.watch()
    expert.kill("nonsense")
    await until(lambda: expert.restarts == 1)
    assert any("cannot be started: the interpreter is gone" in line for line in lines)
    await expert.stop()
