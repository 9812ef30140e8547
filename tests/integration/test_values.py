"""Values of a request, good and bad, through a real coordinator: each answer is the definition's or INVALID_ARGUMENT.

Beside every one a greedy stream runs whose text must not change, and no expert is started again. The experts' logits
are float32, as those of models are.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tests.integration.frail_swarm import ENDLESS, GREEDY, LIKE_A_MODEL, Single, Swarm, swarm, until
from token_swarm import ranges
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.v1 import swarm_pb2

INNOCENT = "acab"
RULES = {Rule.LINEAR: swarm_pb2.RULE_LINEAR, Rule.LOG_LINEAR: swarm_pb2.RULE_LOG_LINEAR}


@pytest_asyncio.fixture
async def running(tmp_path: Path) -> AsyncIterator[Swarm]:
    """A swarm in which a greedy text is written during the whole test; nothing may have happened to it."""
    async with swarm(tmp_path, kind=Single) as one:
        before, _ = await one.text(INNOCENT, max_bytes=150)
        innocent = asyncio.create_task(one.text(INNOCENT, max_bytes=150))
        await until(lambda: any(text.being_written for text in one.engine.texts))
        yield one
        assert (await innocent)[0] == before
        assert one.revived == []
        assert [link.restarts for link in one.engine.links.values()] == [0, 0]
        await one.nothing_held()


def mixed(mixture: Mixture) -> swarm_pb2.Mixture:
    return swarm_pb2.Mixture(
        rule=RULES[mixture.rule],
        weights=[
            swarm_pb2.ExpertWeight(expert=name, weight=weight, temperature=mixture.temperatures.get(name))
            for name, weight in mixture.weights.items()
        ],
    )


def local() -> LocalEnsemble:
    """The same experts in this process, in float64."""
    return LocalEnsemble(
        {name: ToyExpert(name, own, **LIKE_A_MODEL, seed=i + 1) for i, (name, own) in enumerate(ENDLESS.items())}
    )


async def refused(call: Any) -> str:
    """The field that a call is refused for."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    status: Any = rpc_status.from_call(caught.value)
    violation = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(violation)
    assert "; it must be " in (caught.value.details() or "")
    field: str = violation.field_violations[0].field
    return field


LEAST, MOST = ranges.EXPERT_TEMPERATURE.low, ranges.EXPERT_TEMPERATURE.high
BAD_WEIGHTS = [1e12, -1e12, 1e308, -1e308, 1000.1, math.nan, math.inf, -math.inf]
BAD_TEMPERATURES = [1e-12, 0.0, 5e-324, -1.0, LEAST / 2, 2 * MOST, 1e308, math.nan, math.inf]


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.value)
async def test_weights_and_temperatures_out_of_range(running: Swarm, rule: Rule) -> None:
    def both(weight: float, temperature: float) -> list[Any]:
        entry = swarm_pb2.ExpertWeight(expert="e0", weight=weight, temperature=temperature)
        own = swarm_pb2.Mixture(rule=RULES[rule], weights=[entry])
        score = swarm_pb2.ScoreRequest(prompt="ab", text="abc", mixture=own)
        return [running.text("ab", mixture=own), running.stub.Score(score, timeout=20)]

    for weight in BAD_WEIGHTS + ([-1.0] if rule is Rule.LINEAR else []):
        assert {await refused(call) for call in both(weight, 1.0)} == {"weights[e0]"}
    for temperature in BAD_TEMPERATURES:
        assert {await refused(call) for call in both(1.0, temperature)} == {"temperatures[e0]"}


ACCEPTED = [
    Mixture({"e0": 1000.0}),
    Mixture({"e0": -1000.0}),
    Mixture({"e0": 1e-300}),
    Mixture({"e0": 1000.0}, temperatures={"e0": LEAST}),
    Mixture({"e0": 1.0}, temperatures={"e0": LEAST}),
    Mixture({"e0": 1.0}, temperatures={"e0": MOST}),
    Mixture({"e0": 1.0, "e1": 1.0}, temperatures={"e0": LEAST, "e1": MOST}),
    Mixture({"e0": 1000.0, "e1": -1000.0}),
    Mixture({"e0": 1000.0, "e1": 5e-324}),
    Mixture({"e0": 1000.0, "e1": 1e-300}, Rule.LINEAR),
    Mixture({"e0": 1.0, "e1": 0.8}, Rule.LINEAR, {"e0": LEAST, "e1": LEAST}),
]


@pytest.mark.parametrize("mixture", ACCEPTED, ids=repr)
async def test_accepted_mixtures_give_what_the_definition_gives(running: Swarm, mixture: Mixture) -> None:
    text, _ = await running.text("ab", mixture=mixed(mixture), max_bytes=40)
    request = DecodeRequest(sampling=Sampling(temperature=0.0), max_bytes=40)
    assert text == local().generate("ab", mixture, request)[0]
    asked = swarm_pb2.ScoreRequest(prompt="ab", text="abcab", mixture=mixed(mixture), per_byte=True)
    score = await running.stub.Score(asked, timeout=20)
    expected = local().score("ab", "abcab", mixture)
    assert math.isfinite(score.log_prob)
    # The experts' own logits are rounded to float32, and exponents of up to 20 000 multiply that.
    np.testing.assert_allclose(score.byte_log_probs, expected.per_byte, rtol=1e-4, atol=0.02)


@pytest.mark.parametrize("temperature", [1e-6, 4e-6, 1e-15, 5e-324, 1e-3 - 1e-9, 0.0])
async def test_small_temperatures_are_greedy(running: Swarm, temperature: float) -> None:
    greedy, _ = await running.text("ab", sampling=GREEDY)
    text, finish = await running.text("ab", sampling=swarm_pb2.Sampling(temperature=temperature, seed=1))
    assert text == greedy
    assert len(text) == 120
    assert not finish.HasField("seed")


@pytest.mark.parametrize("unit", [swarm_pb2.UNIT_BYTE, swarm_pb2.UNIT_UNION])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.1, 1.0, 100.0])
async def test_accepted_temperatures_write_a_text_to_its_limit(running: Swarm, temperature: float, unit: int) -> None:
    sampling = swarm_pb2.Sampling(temperature=temperature, seed=1)
    text, finish = await running.text("ab", sampling=sampling, unit=unit)
    assert finish.reason == swarm_pb2.FINISH_REASON_MAX_BYTES, finish
    assert len(text) == 120


SAMPLING = {
    "temperature": [-1e-9, 100.1, 1e308, math.nan, math.inf, -math.inf],
    "top_p": [0.0, -0.1, 1.0000001, math.nan, math.inf],
    "min_p": [-1e-9, 1.0000001, math.nan, math.inf],
}


async def test_other_numbers_out_of_range(running: Swarm) -> None:
    for field, values in SAMPLING.items():
        for value in values:
            assert await refused(running.text("ab", sampling=swarm_pb2.Sampling(**{field: value}))) == field
    for field, wrong in {"max_bytes": 0, "max_tokens": 0, "draft_tokens": 17, "epsilon": 1.0}.items():
        assert await refused(running.text("ab", **{field: wrong})) == field
    for epsilon in (-1e-9, math.nan, math.inf):
        assert await refused(running.text("ab", epsilon=epsilon)) == "epsilon"


async def test_other_numbers_at_their_bounds(running: Swarm) -> None:
    expected, _ = await running.text("ab")
    most = 2**64 - 1
    assert (await running.text("ab", max_tokens=most))[0] == expected
    assert (await running.text("ab", max_bytes=most, max_tokens=5))[0] == (await running.text("ab", max_tokens=5))[0]
    for sampling in ({"top_k": 2**32 - 1}, {"top_k": 2**31}, {"top_p": 5e-324}, {"min_p": 1.0}, {"seed": most}):
        text, _ = await running.text("ab", sampling=swarm_pb2.Sampling(temperature=1.0, **sampling))
        assert len(text) == 120, sampling
    for epsilon in (5e-324, 1 - 1e-16):
        assert len((await running.text("ab", epsilon=epsilon, max_bytes=8))[0]) == 8
