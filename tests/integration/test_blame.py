"""Which expert is started again for invalid logits, and which text ends instead: over real gRPC, with toy experts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from token_swarm_server.coordinator.expert.link import ExpertLink
from token_swarm_server.coordinator.recovery import Members

from tests.integration.frail_swarm import Swarm, swarm, undisturbed, until
from tests.integration.test_faults import poisoned
from token_swarm.v1 import swarm_pb2

Code = grpc.StatusCode
HARMFUL = "bacab"
"""A prompt after which e1's logits are NaN, and with them those after everything that begins with it."""


def harm(running: Swarm) -> None:
    tokens = running.experts["e1"].encode(HARMFUL).tokens
    running.experts["e1"].bad_after = lambda history: history[: len(tokens) - 1] == tokens[:-1]


async def refused(call: Any) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("unit", [swarm_pb2.UNIT_BYTE, swarm_pb2.UNIT_UNION])
async def test_a_text_that_an_expert_cannot_take_ends_and_harms_nobody(tmp_path: Path, unit: int) -> None:
    async with swarm(tmp_path) as running:
        harm(running)
        before, _ = await running.text("ab", unit=unit)
        innocent = asyncio.create_task(running.text("ab", unit=unit))
        await until(lambda: bool(running.engine.texts))
        found = await asyncio.gather(*(refused(running.text(HARMFUL, unit=unit)) for _ in range(3)))
        for code, details in found:
            assert code is Code.FAILED_PRECONDITION
            assert "expert 'e1' cannot go on with this text: logits hold NaN" in details
        assert (await innocent)[0] == before
        assert running.revived == []
        assert [link.restarts for link in running.engine.links.values()] == [0, 0]
        await running.nothing_held()


async def test_such_a_text_is_not_scored_either(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        harm(running)
        request = swarm_pb2.ScoreRequest(prompt=HARMFUL, text="abc")
        code, details = await refused(running.stub.Score(request, timeout=20))
        assert code is Code.FAILED_PRECONDITION
        assert "'e1'" in details
        assert running.revived == []
        await running.nothing_held()


async def test_such_a_text_may_go_on_without_the_expert(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        harm(running)
        text, finish = await running.text(HARMFUL, on_expert_failure=swarm_pb2.ON_EXPERT_FAILURE_DROP)
        assert len(text) == 120
        assert list(finish.dropped) == ["e1"]
        assert running.revived == []
        await running.nothing_held()


async def test_invalid_logits_that_do_not_come_again_are_forgotten(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        text = asyncio.create_task(running.text("ab"))
        await until(lambda: running.experts["e1"].steps > 10)
        running.experts["e1"].mischief = poisoned
        assert (await text)[0] == undisturbed("ab")
        assert running.revived == []
        await running.nothing_held()


async def test_the_probe_needs_no_sequence_beyond_the_text_s_own(tmp_path: Path) -> None:
    async with swarm(tmp_path, lanes_per_expert=8) as running:
        # The text holds all sequences that the expert has.
        assert running.experts["e1"].spec.max_sequences <= 16
        harm(running)
        texts = [refused(running.text(HARMFUL)) for _ in range(4)]
        assert {code for code, _ in await asyncio.gather(*texts)} == {Code.FAILED_PRECONDITION}
        assert running.revived == []


async def test_a_probe_is_shared(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        link = running.engine.links["e1"]
        steps = running.experts["e1"].steps
        assert await asyncio.gather(*(link.probe() for _ in range(20))) == [True] * 20
        assert running.experts["e1"].steps - steps <= 2
        running.experts["e1"].bad_after = lambda tokens: True
        assert await link.probe() is False
        await running.nothing_held()


async def test_an_expert_that_nobody_probes_is_killed_for_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: without the probe the tests above would not pass."""

    async def never_sound(self: Members, name: str) -> bool:
        return False

    monkeypatch.setattr(Members, "_is_sound", never_sound)
    async with swarm(tmp_path) as running:
        harm(running)
        text = asyncio.create_task(running.text(HARMFUL))
        await until(lambda: len(running.revived) > 0)
        text.cancel()
        await asyncio.gather(text, return_exceptions=True)


async def test_an_expert_whose_probe_always_passes_is_never_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other mutant: `test_an_expert_at_fault_is_started_again` would not pass."""

    async def sound(self: ExpertLink) -> bool:
        return True

    monkeypatch.setattr(ExpertLink, "probe", sound)
    async with swarm(tmp_path) as running:
        running.experts["e1"].bad_after = lambda tokens: True
        code, _ = await refused(running.text("ab"))
        assert code is Code.FAILED_PRECONDITION
        assert running.revived == []
