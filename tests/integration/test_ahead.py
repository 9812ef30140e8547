"""The answer of the faster expert is worked on while the slower one computes, whatever happens to either."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.integration.frail_swarm import GREEDY, Swarm, swarm, undisturbed, until
from tests.integration.test_faults import _drain, poisoned
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.v1 import swarm_pb2

PROMPTS = ["ab", "cab", "ba"]
SECONDS = 20.0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups that laws were made of before all experts had answered."""
    groups: list[int] = []
    ahead = ByteUnit.ahead

    def counted(self: ByteUnit, need: Any, rows: Any, stopwatch: Any) -> Any:
        work = ahead(self, need, rows, stopwatch)

        def run() -> object:
            groups.append(need.group)
            return work()

        return run

    monkeypatch.setattr(ByteUnit, "ahead", counted)
    return groups


def slow(running: Swarm) -> None:
    """e1 is the slower one from here on."""
    running.experts["e1"].seconds = 0.02


async def test_texts_are_the_same(tmp_path: Path, made: list[int]) -> None:
    async with swarm(tmp_path) as running:
        slow(running)
        texts = [asyncio.create_task(running.text(prompt)) for prompt in PROMPTS]
        assert [(await text)[0] for text in texts] == [undisturbed(prompt) for prompt in PROMPTS]
        assert made.count(0) > 10
        await running.nothing_held()


async def test_the_slower_expert_may_be_lost(tmp_path: Path, made: list[int]) -> None:
    async with swarm(tmp_path) as running:
        slow(running)
        texts = [asyncio.create_task(running.text(prompt)) for prompt in PROMPTS]
        await until(lambda: running.experts["e1"].steps > 5)
        # Alone in a step: the other one's answer has been worked on when this one is lost.
        before = len(made)
        await until(lambda: len(made) > before)
        await running.kill("e1")
        await running.start("e1")
        slow(running)
        finished = [await text for text in texts]
        assert [written for written, _ in finished] == [undisturbed(prompt) for prompt in PROMPTS]
        assert any(finish.reopened for _, finish in finished)
        await running.nothing_held()


async def test_the_faster_expert_may_answer_nonsense(tmp_path: Path, made: list[int]) -> None:
    async with swarm(tmp_path) as running:
        slow(running)
        texts = [asyncio.create_task(running.text(prompt)) for prompt in PROMPTS]
        await until(lambda: len(made) > 5)
        running.experts["e0"].mischief = poisoned
        finished = [await text for text in texts]
        assert [written for written, _ in finished] == [undisturbed(prompt) for prompt in PROMPTS]
        assert running.revived == []  # bad for once: the probe finds it sound
        await running.nothing_held()


async def test_a_text_may_be_cancelled_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, made = threading.Event(), threading.Event(), list[int]()
    ahead = ByteUnit.ahead

    def held(self: ByteUnit, need: Any, rows: Any, stopwatch: Any) -> Any:
        work = ahead(self, need, rows, stopwatch)

        def run() -> object:
            begun.set()
            go.wait(SECONDS)
            made.append(need.group)
            return work()

        return run

    async with swarm(tmp_path, mixing_threads=3) as running:
        slow(running)
        others = [asyncio.create_task(running.text(prompt)) for prompt in PROMPTS[:2]]
        call = running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ba", sampling=GREEDY, max_bytes=120))
        reading = asyncio.create_task(_drain(call))
        await until(lambda: sum(text.being_written for text in running.engine.texts) == 3)
        monkeypatch.setattr(ByteUnit, "ahead", held)
        await asyncio.to_thread(begun.wait, SECONDS)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: len(running.engine.texts) < 3)
        go.set()
        assert [(await text)[0] for text in others] == [undisturbed(prompt) for prompt in PROMPTS[:2]]
        assert made
        await running.nothing_held()
