"""A running coordinator writes what the same experts write in one process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from token_swarm_server.remote_generate import RemoteGenerate

from tests.integration.test_coordinator import coordinator
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.mixing.shaping import Shaping
from token_swarm.particle import Mixture, Rule
from token_swarm.search.data import PatternExample
from token_swarm.search.utilities import Generations, Regex, local_generate
from token_swarm.search.utility import UtilityUnavailable

MIXTURES = [
    Mixture({"e0": 1.0, "e1": 0.0}),
    Mixture({"e0": 0.4, "e1": 0.6}, Rule.LINEAR, {"e0": 1.5}),
    Mixture({"e0": 1.3, "e1": -0.3}),
]
REQUESTS = [
    DecodeRequest(max_bytes=12, seed=7),
    DecodeRequest(max_tokens=5, seed=2**63, shaping=Shaping(temperature=0.7, top_p=0.9), stop=(b"ab",)),
    DecodeRequest(max_bytes=9, shaping=Shaping(temperature=0.0)),
]
EXAMPLES = [PatternExample(prompt=prompt, pattern="ab") for prompt in ("abc", "cab", "b")]


async def test_it_writes_what_the_process_writes(tmp_path: Path) -> None:
    local = local_generate(LocalEnsemble(toys([NESTED, LONG])))
    async with coordinator(tmp_path) as running:
        with RemoteGenerate(running.address) as remote:
            for mixture in MIXTURES:
                for request in REQUESTS:
                    expected = local("abcab", mixture, request, False)
                    assert await asyncio.to_thread(remote, "abcab", mixture, request, False) == expected
            here = Regex(EXAMPLES, Generations(local, REQUESTS[0])).evaluate(MIXTURES)
            there = Regex(EXAMPLES, Generations(remote, REQUESTS[0], concurrency=3))
            assert (await asyncio.to_thread(there.evaluate, MIXTURES)).values.tolist() == here.values.tolist()


async def test_a_request_that_is_refused_fails_alone(tmp_path: Path) -> None:
    async with coordinator(tmp_path) as running:
        with RemoteGenerate(running.address) as remote:
            with pytest.raises(ValueError, match=r"the server refuses: .*prompt"):
                await asyncio.to_thread(remote, "ab" * 300, MIXTURES[1], REQUESTS[0], False)
            with pytest.raises(UtilityUnavailable, match="no expert named 'e9'"):
                await asyncio.to_thread(remote, "ab", Mixture({"e9": 1.0}), REQUESTS[0], False)
            with pytest.raises(BadParameter, match="window"):
                remote("ab", MIXTURES[0], DecodeRequest(window=3), False)


def test_a_server_that_is_away_stops_the_search() -> None:
    slept: list[float] = []
    with (
        RemoteGenerate("127.0.0.1:9", retries=2, sleep=slept.append) as remote,
        pytest.raises(UtilityUnavailable, match=r"127\.0\.0\.1:9 does not generate"),
    ):
        remote("ab", MIXTURES[0], REQUESTS[0], False)
    assert slept == [1.0, 2.0]
