"""A running coordinator writes the same texts for a search as the ensemble in this process would."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from token_swarm_server.search.experts import RemoteExperts
from token_swarm_server.search.remote import RemoteEnsemble, request_to_proto

from tests.integration.test_coordinator import coordinator
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule
from token_swarm.search.data import PromptExample, save_jsonl
from token_swarm.search.evaluators import SerialEvaluator
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.run import Search, SearchConfig
from token_swarm.search.run.task import Preparation
from token_swarm.search.utilities import Goal, Judging
from token_swarm.search.utility import UtilityUnavailable

REQUEST = DecodeRequest(sampling=Sampling(temperature=0.9), seed=3, max_bytes=20, stop=(b"abba",))


def count_a(prompt: str, text: str) -> float:
    """A reward for the tests."""
    return float(text.count("a"))


@pytest.mark.parametrize("rule", list(Rule))
async def test_a_server_writes_what_one_process_would(tmp_path: Path, rule: Rule) -> None:
    mixture = Mixture({"e0": 0.3, "e1": 0.7}, rule, temperatures={"e1": 1.5})
    local = LocalEnsemble(toys([NESTED, LONG], max_context=200))
    async with coordinator(tmp_path) as running:
        with RemoteEnsemble(running.address) as remote:
            for prompt in ("cab", "ba"):
                text = await asyncio.to_thread(remote.generate, prompt, mixture, REQUEST, False)
                assert text == local.generate(prompt, mixture, REQUEST)[0]


async def test_a_search_over_a_server_finds_what_one_process_finds(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "prompts.jsonl", [PromptExample(prompt=prompt) for prompt in ("cab", "ba", "abc", "c")])
    goal = Goal.load("reward", tmp_path / "prompts.jsonl", None)
    judging = Judging(reward=f"{__name__}:count_a", request=REQUEST)
    space = Space(("e0", "e1"))
    config = SearchConfig(optimiser="random", settings={"particles": 4, "iterations": 2})
    local = LocalEnsemble(toys([NESTED, LONG], max_context=200))
    async with coordinator(tmp_path) as running:
        with RemoteEnsemble(running.address) as remote:
            experts = RemoteExperts(remote, tmp_path / "texts", concurrency=3)
            task = await asyncio.to_thread(Preparation(experts, (goal,), space, judging, 0.0).task)
            search = Search(task, config, tmp_path / "run", SerialEvaluator())
            result = await asyncio.to_thread(search.run)
    specs = local.ensemble.specs
    assert result.particle.fingerprints == {name: spec.vocabulary.fingerprint for name, spec in specs.items()}
    scores = task.dev.evaluate([result.particle.mixture])  # from the kept texts: the server is gone
    assert scores.utility()[0] == result.particle.dev_score


async def test_what_a_server_refuses_is_the_mixtures_fault(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running:
        with RemoteEnsemble(running.address) as remote, pytest.raises(BadParameter, match="nobody"):
            await asyncio.to_thread(remote.generate, "cab", Mixture({"nobody": 1.0}), REQUEST, False)


def test_a_server_that_is_not_there_is_unavailable_after_some_attempts() -> None:
    with RemoteEnsemble("127.0.0.1:9", wait=0.001) as remote:
        with pytest.raises(UtilityUnavailable, match=r"127\.0\.0\.1:9"):
            remote.generate("cab", Mixture({"e0": 1.0}), REQUEST, False)
        with pytest.raises(UtilityUnavailable, match="nothing listens there"):
            remote.keys()


async def test_a_busy_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with coordinator(tmp_path) as running:
        with RemoteEnsemble(running.address, wait=0.001) as remote:
            real, calls = remote._stub.Generate, []

            class Busy(grpc.RpcError):
                def code(self):
                    return grpc.StatusCode.RESOURCE_EXHAUSTED

                def details(self):
                    return "the queue is full"

            def first_busy(message, timeout):
                calls.append(message)
                if len(calls) < 3:
                    raise Busy
                return real(message, timeout=timeout)

            monkeypatch.setattr(remote._stub, "Generate", first_busy)
            assert await asyncio.to_thread(remote.generate, "cab", Mixture({"e0": 1.0}), REQUEST, False)
    assert len(calls) == 3


def test_a_request_cannot_carry_a_window() -> None:
    with pytest.raises(BadParameter, match="window"):
        request_to_proto("x", Mixture({"e0": 1.0}), replace(REQUEST, window=3), False)


def test_a_server_cannot_read_data(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "x"}\n')
    goal = Goal.load("loglikelihood", tmp_path / "texts.jsonl", None)
    with RemoteEnsemble("127.0.0.1:9") as remote, pytest.raises(BadParameter, match="cannot read data"):
        Preparation(RemoteExperts(remote, tmp_path), (goal,), Judging(), Space(("e0",)), 0.0).task()
