"""Experts that die, hang, or answer nonsense in the middle of texts: over real gRPC, with toy experts."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from token_swarm_server.coordinator.expert.link import LinkState
from token_swarm_server.expert_server.server import ExpertServer

from tests.integration.frail_swarm import ENDLESS, GREEDY, LIKE_A_MODEL, Frail, Swarm, swarm, undisturbed, until
from tests.laws.ensembles import NESTED
from token_swarm.decoding.decoder import Decoder
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.decoding.score import scored_text
from token_swarm.experts.contract import EncodedPrompt, StepResult
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture
from token_swarm.v1 import swarm_pb2

WAIT, FAIL, DROP = (
    swarm_pb2.ON_EXPERT_FAILURE_WAIT,
    swarm_pb2.ON_EXPERT_FAILURE_FAIL,
    swarm_pb2.ON_EXPERT_FAILURE_DROP,
)


async def test_texts_outlive_an_expert_that_dies(tmp_path: Path) -> None:
    prompts = ["ab", "cab", "ba", "acab"]
    async with swarm(tmp_path) as running:
        texts = [asyncio.create_task(running.text(prompt)) for prompt in prompts]
        await until(lambda: running.experts["e1"].steps > 10)
        await running.kill("e1")
        await until(lambda: running.engine.links["e1"].state is LinkState.DOWN)
        listed = (await running.stub.ListExperts(swarm_pb2.ListExpertsRequest())).experts
        assert [(e.name, e.state, e.reason) for e in listed] == [
            ("e0", swarm_pb2.EXPERT_STATE_READY, ""),
            ("e1", swarm_pb2.EXPERT_STATE_DOWN, "its process was ended by signal 9"),
        ]
        # A text that begins meanwhile waits too.
        late = asyncio.create_task(running.text("bab"))
        await asyncio.sleep(0.1)
        await running.start("e1")
        for prompt, text in zip([*prompts, "bab"], [*texts, late], strict=True):
            written, finish = await text
            assert written == undisturbed(prompt)
            assert not finish.dropped
            assert finish.reopened >= (prompt != "bab")
        assert running.engine.links["e1"].restarts == 1
        await running.nothing_held()


async def test_a_text_that_waits_for_an_expert_is_not_being_written(tmp_path: Path) -> None:
    # Prompts are read slowly for the sake of texts that are.
    async with swarm(tmp_path) as running:
        texts = running.engine.texts
        text = asyncio.create_task(running.text("ab"))
        await until(lambda: any(each.being_written for each in texts))
        await running.kill("e1")
        await until(lambda: not any(each.being_written for each in texts))
        assert len(texts) == 1
        await running.start("e1")
        assert (await text)[0] == undisturbed("ab")
        assert not texts


async def test_a_request_may_rather_fail(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        failing = asyncio.create_task(running.text("ab", on_expert_failure=FAIL))
        alone = asyncio.create_task(
            running.text("ab", mixture=swarm_pb2.Mixture(weights=[swarm_pb2.ExpertWeight(expert="e0", weight=1)]))
        )
        await until(lambda: running.experts["e1"].steps > 10)
        await running.kill("e1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await failing
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "'e1'" in (caught.value.details() or "")
        status: Any = rpc_status.from_call(caught.value)
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToTimedelta().total_seconds() > 0
        assert len((await alone)[0]) == 120
        await running.start("e1")
        await until(lambda: running.engine.links["e1"].state is LinkState.READY)
        await running.nothing_held()


async def test_a_text_that_failed_lets_its_laws_go_at_once(tmp_path: Path) -> None:
    # gRPC's call and the error it ends with hold each other, and the error the frames that it went through.
    async with swarm(tmp_path) as running:
        gc.collect()
        gc.disable()
        try:
            failing = asyncio.create_task(running.text("ab", on_expert_failure=FAIL))
            await until(lambda: running.experts["e1"].steps > 10)
            await running.kill("e1")
            with pytest.raises(grpc.aio.AioRpcError):
                await failing
            await until(lambda: not any(type(each) is Decoder for each in gc.get_objects()))
        finally:
            gc.enable()


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    async with swarm(tmp_path, wait_seconds=0.2) as running:
        text = asyncio.create_task(running.text("ab"))
        await until(lambda: running.experts["e1"].steps > 10)
        await running.kill("e1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await text
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "did not come back within 0.2 s" in (caught.value.details() or "")
        assert "signal 9" in (caught.value.details() or "")


@pytest.mark.parametrize("unit", [swarm_pb2.UNIT_BYTE, swarm_pb2.UNIT_UNION])
async def test_a_text_may_go_on_without_an_expert(tmp_path: Path, unit: int) -> None:
    async with swarm(tmp_path) as running:
        text = asyncio.create_task(running.text("ab", on_expert_failure=DROP, unit=unit, max_tokens=100))
        await until(lambda: running.experts["e1"].steps > 10)
        await running.kill("e1")
        written, finish = await text
        assert list(finish.dropped) == ["e1"]
        assert finish.reopened == 0
        assert {use.expert for use in finish.experts} == {"e0", "e1"}
        assert sum(use.share for use in finish.experts) == pytest.approx(1)
        # The bytes that both wrote are those of the undisturbed text, and there were some.
        if unit == swarm_pb2.UNIT_BYTE:
            both = undisturbed("ab")
            common = next((i for i, (a, b) in enumerate(zip(written, both, strict=False)) if a != b), len(written))
            assert common >= 5
            # From some byte on, it is what the living expert writes after what was written.
            assert any(
                written[cut:] == alone("e0", "ab", written[:cut]) for cut in range(common + 1)
            )
        # A new text starts without the dead expert.
        _, finish = await running.text("ba", on_expert_failure=DROP, max_bytes=20)
        assert list(finish.dropped) == ["e1"]
        assert [use.expert for use in finish.experts] == ["e0"]
        await running.kill("e0")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(running.text("ba", on_expert_failure=FAIL, max_bytes=20), 10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def alone(name: str, prompt: str, begun: str) -> str:
    """What one expert writes greedily, byte by byte, after a prompt and the text so far."""
    expert = ToyExpert(name, ENDLESS[name], **LIKE_A_MODEL, seed=list(ENDLESS).index(name) + 1)
    local = LocalEnsemble({name: expert})
    request = DecodeRequest(sampling=Sampling(temperature=0.0), max_bytes=120 - len(begun))
    mixture = Mixture({name: 1.0})
    encoded = expert.encode(prompt)
    if begun:
        context, whole = scored_text(expert.spec, encoded, begun)
        tokens = context + expert.tokenize(whole)
        encoded = EncodedPrompt(tokens, len(expert.spec.vocabulary.token_bytes[tokens[-1]] or b""))
    unit = local.ensemble.byte_unit(local.ensemble.groups(mixture), request, {name: encoded})
    return "".join(local.pieces(Decoder(unit, request, allocate=local.allocate)))


def poisoned(result: StepResult) -> StepResult:
    return StepResult(torch.full_like(result.logits, torch.nan), result.spans, result.errors)


def misshapen(result: StepResult) -> StepResult:
    return StepResult(result.logits[:, :-1], result.spans, result.errors)


def hanging(result: StepResult) -> StepResult:
    time.sleep(4)
    return result


def breaks(expert: Frail) -> None:
    expert.bad_after = lambda tokens: True


def hangs(expert: Frail) -> None:
    expert.mischief = hanging


@pytest.mark.parametrize(
    ("fails", "said"),
    [(breaks, "NaN"), (hangs, "no answer to a step within 2 s")],
    ids=["poisoned", "hanging"],
)
async def test_an_expert_at_fault_is_started_again(tmp_path: Path, fails: Any, said: str) -> None:
    async with swarm(tmp_path, step_seconds=2) as running:
        texts = [asyncio.create_task(running.text(prompt)) for prompt in ("ab", "cab")]
        await until(lambda: running.experts["e1"].steps > 10)
        fails(running.experts["e1"])
        finished = [await text for text in texts]
        assert [written for written, _ in finished] == [undisturbed(prompt) for prompt in ("ab", "cab")]
        assert sum(finish.reopened for _, finish in finished) >= 1
        assert [name for name, _ in running.revived] == ["e1"]
        assert said in running.revived[0][1]
        await running.nothing_held()


async def test_an_expert_that_breaks_its_contract_ends_its_stream_and_texts_go_on(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        text = asyncio.create_task(running.text("ab"))
        await until(lambda: running.experts["e1"].steps > 10)
        running.experts["e1"].mischief = misshapen
        written, finish = await text
        assert written == undisturbed("ab")
        assert finish.reopened >= 1
        await running.nothing_held()


async def test_an_expert_that_always_answers_nonsense_ends_the_text(tmp_path: Path) -> None:
    class Insane(Frail):
        def step(self, ops: Any) -> StepResult:
            return poisoned(super().step(ops))

    async with swarm(tmp_path) as running:
        await running.kill("e1")
        insane = Insane("e1", ENDLESS["e1"], seed=2)

        async def start(name: str) -> None:
            server = ExpertServer(insane, str(running.settings.experts[name].address))
            await server.start()
            running.servers[name] = server

        running.start = start  # type: ignore[method-assign]
        await start("e1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.text("ab")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "NaN" in (caught.value.details() or "")
        await until(lambda: running.engine.links["e1"].state is LinkState.READY)
        await running.nothing_held()


async def test_health_follows_the_quorum(tmp_path: Path) -> None:
    async with swarm(tmp_path, quorum=1) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        seen: list[int] = []

        async def watch() -> None:
            request = health_pb2.HealthCheckRequest(service="token_swarm.v1.SwarmService")
            async for answer in stub.Watch(request):
                seen.append(answer.status)  # noqa: PERF401 - an endless stream

        watching = asyncio.create_task(watch())
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await until(lambda: seen == [serving])
        await running.kill("e1")
        await until(lambda: running.engine.ready == 1)
        await running.kill("e0")
        await until(lambda: seen == [serving, not_serving])
        await running.start("e0")
        await until(lambda: seen == [serving, not_serving, serving])
        watching.cancel()


async def test_an_expert_with_another_vocabulary_is_not_accepted(tmp_path: Path) -> None:
    async with swarm(tmp_path) as running:
        await running.kill("e1")
        await until(lambda: running.engine.links["e1"].state is LinkState.DOWN)
        other = ExpertServer(ToyExpert("e1", NESTED), str(running.settings.experts["e1"].address))
        await other.start()
        running.servers["e1"] = other
        await until(lambda: "another vocabulary" in running.engine.links["e1"].reason)
        assert running.engine.links["e1"].state is LinkState.DOWN


async def test_five_hundred_cancels_leak_nothing(tmp_path: Path) -> None:
    async with swarm(tmp_path, max_queue=600) as running:
        rng = torch.Generator().manual_seed(0)

        async def one(index: int) -> None:
            pause = float(torch.rand((), generator=rng)) * 0.4
            request = swarm_pb2.GenerateRequest(prompt="ab" * (1 + index % 20), sampling=GREEDY, max_bytes=300)
            # A third each: the client cancels, its deadline passes, it ends as it should or is cancelled late.
            call = running.stub.Generate(request, timeout=pause if index % 3 == 1 else None)
            if index % 3 == 1:
                with pytest.raises(grpc.aio.AioRpcError):
                    await _drain(call)
                return
            reading = asyncio.create_task(_drain(call))
            await asyncio.sleep(pause)
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)

        for start in range(0, 500, 50):
            await asyncio.gather(*(one(index) for index in range(start, start + 50)))
        await running.nothing_held()
        assert (await running.text("ab"))[0] == undisturbed("ab")


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_the_server_bounds_the_life_of_a_request(tmp_path: Path) -> None:
    async with swarm(tmp_path, max_seconds=0.3) as running:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.text("ab", max_bytes=100_000)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "longer than this server allows, 0.3 s" in (caught.value.details() or "")
        await running.nothing_held()


async def test_a_reader_that_stands_still_holds_up_nobody_else(tmp_path: Path) -> None:
    async with swarm(tmp_path, max_seconds=5) as running:
        still = running.stub.Generate(swarm_pb2.GenerateRequest(prompt="ab", sampling=GREEDY, max_bytes=380))
        await still.read()
        for _ in range(3):
            assert len((await running.text("ba"))[0]) == 120
        still.cancel()
        await running.nothing_held()


async def test_the_queue_is_bounded_in_requests_and_in_bytes(tmp_path: Path) -> None:
    async with swarm(tmp_path, max_queue=2, max_queue_bytes=100, lanes_per_expert=8) as running:
        # Two run, as an expert has 16 sequences.
        tasks = [asyncio.create_task(running.text("ab", max_bytes=300)) for _ in range(2)]
        await until(lambda: running.engine.running == 2)
        tasks.append(asyncio.create_task(running.text("ab" * 30)))
        await until(lambda: running.engine.admission.waiting == 1)
        for prompt, said in (("ab" * 30, "together at most 100"), ("ab", "the most allowed")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await running.text(prompt)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert said in (caught.value.details() or "")
            status: Any = rpc_status.from_call(caught.value)
            assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
            if said.startswith("together"):
                tasks.append(asyncio.create_task(running.text("ab")))
                await until(lambda: running.engine.admission.waiting == 2)
        await asyncio.gather(*tasks)
        await running.nothing_held()


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03, 0.06])
async def test_score_outlives_an_expert(tmp_path: Path, after: float) -> None:
    """Wherever the score is: the expert may owe it rows or not, and be back before it is asked again."""
    async with swarm(tmp_path) as running:
        request = swarm_pb2.ScoreRequest(prompt="ab", text="abcab" * 60)
        expected = (await running.stub.Score(request)).log_prob
        score = asyncio.create_task(_score(running, request))
        await asyncio.sleep(after)
        await running.kill("e1")
        await running.start("e1")
        assert await score == pytest.approx(expected)
        await running.nothing_held()


async def _score(running: Swarm, request: swarm_pb2.ScoreRequest) -> float:
    return float((await running.stub.Score(request)).log_prob)
