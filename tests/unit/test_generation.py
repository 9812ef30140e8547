"""When a text goes on: with every answer, and with nothing working on one any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from token_swarm_server.coordinator import text as generation
from token_swarm_server.coordinator.mixing_pool import MixingPool
from token_swarm_server.coordinator.recovery import Members, Round
from token_swarm_server.coordinator.text import Generation
from token_swarm_server.telemetry.observer import Observer

from token_swarm.decoding.forwards import Outcome
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.contract import OpError, OpErrorKind
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.stopwatch import Stopwatch
from token_swarm.particle import Rule

REFUSED = OpError(OpErrorKind.UNKNOWN_SEQUENCE, "no such sequence")


class OneRound:
    """A decoder of one round. Of a refusal nothing is made ahead."""

    finished = True

    def __init__(self) -> None:
        self.stopwatch = Stopwatch()
        self.begun = self.ended = 0
        self.seen: tuple[int, int] | None = None

    def calls(self, _drafts: int) -> Mapping[str, Sequence[Any]]:
        return {} if self.seen else {"a": (), "b": ()}

    def ahead(self, _name: str, outcomes: Sequence[Outcome], _stopwatch: Stopwatch) -> Callable[[], None] | None:
        if isinstance(outcomes[0], OpError):
            return None
        self.begun += 1
        return self._make

    def _make(self) -> None:
        self.ended += 1

    def resume(self, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        assert list(outcomes) == ["a", "b"]
        self.seen = self.begun, self.ended

    def take_text(self) -> str:
        return ""


@pytest.mark.parametrize("early", [True, False], ids=["answered before it looks", "answered later"])
@pytest.mark.parametrize("refusing", ["a", "b", None])
async def test_nothing_works_on_an_answer_when_the_text_goes_on(
    monkeypatch: pytest.MonkeyPatch, refusing: str | None, early: bool
) -> None:
    decoder, pool = OneRound(), MixingPool(2)
    monkeypatch.setattr(generation, "Decoder", lambda *_, **__: decoder)
    futures: dict[str, asyncio.Future[list[Outcome]]] = {
        name: asyncio.get_running_loop().create_future() for name in "ab"
    }

    def answer() -> None:
        for name, future in futures.items():
            future.set_result([REFUSED if name == refusing else torch.zeros(1, 4)])

    async def encode() -> dict[str, Any]:
        return {}

    members: Any = SimpleNamespace(
        mixture=SimpleNamespace(rule=Rule.LINEAR, active={}),
        encode=encode,
        ask=lambda _calls: Round(futures, 0.0),
        round_ended=lambda _round: None,
        outcomes=Members.outcomes,
    )
    ensemble: Any = SimpleNamespace(unit=lambda *_: SimpleNamespace(kind=Unit.BYTE))
    text = Generation(
        ensemble,
        members,
        DecodeRequest(),
        allocate=lambda _name: 1,
        lanes=1,
        drafts=lambda: 0,
        pool=pool,
        watch=Observer().request("generate"),
    )
    await text.open()
    if early:
        answer()
    else:
        asyncio.get_running_loop().call_later(0.01, answer)
    async with asyncio.timeout(20):
        assert [piece async for piece in text.pieces()] == []
    made = 1 if refusing else 2
    assert decoder.seen == (made, made)
    pool.close()
