"""What a request leaves open, and what it may say, as the public protocol's comments promise."""

from __future__ import annotations

import pytest
from token_swarm_server.coordinator.messages import request_from_proto

from token_swarm.decoding.request import DecodeRequest
from token_swarm.errors import BadParameter
from token_swarm.mixing.defaults import MOST_DRAFT_TOKENS
from token_swarm.v1 import swarm_pb2


def read(**fields: object) -> DecodeRequest:
    request = swarm_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]
    return request_from_proto(request, epsilon=0.1, window=8, draft_tokens=4, default_max_bytes=1024)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, (1024, None)),
        ({"max_tokens": 5000}, (None, 5000)),
        ({"max_bytes": 5000}, (5000, None)),
        ({"max_bytes": 7, "max_tokens": 8}, (7, 8)),
    ],
)
def test_a_default_limit_holds_only_where_the_request_has_none(limits: dict[str, int], expected: object) -> None:
    request = read(**limits)
    assert (request.max_bytes, request.max_tokens) == expected


def test_an_empty_prompt_is_a_prompt() -> None:
    assert read(prompt="").max_bytes == 1024


def test_what_is_absent_is_as_the_comments_say() -> None:
    sampling = read().sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 0, 1.0, 0.0)
    assert not sampling.changes_law
    assert not read(sampling=swarm_pb2.Sampling(top_k=0)).sampling.changes_law
    assert read(sampling=swarm_pb2.Sampling(temperature=0)).sampling.greedy


def test_every_seed_of_64_bits_is_taken() -> None:
    for seed in (0, 2**63, 2**64 - 1):
        assert read(sampling=swarm_pb2.Sampling(seed=seed)).seed == seed


def test_drafts_have_the_limit_that_the_comment_names() -> None:
    assert MOST_DRAFT_TOKENS == 16
    assert read(draft_tokens=16).draft_tokens == 16
    with pytest.raises(BadParameter):
        read(draft_tokens=17)
