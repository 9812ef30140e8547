"""The table of ranges: what documentation and protocol say, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from token_swarm import ranges
from token_swarm.errors import BadParameter
from token_swarm.experts.toy import ToyExpert
from token_swarm.mixing.groups import make_groups, split_weights
from token_swarm.mixing.sampling import Sampling
from token_swarm.mixing.token_unit import TokenUnit
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
ALL = (*ranges.REQUEST, *ranges.ELSEWHERE)


def test_the_documentation_shows_the_table() -> None:
    assert ranges.table() in (ROOT / "docs/ranges.md").read_text()


@pytest.mark.parametrize(
    ("message", "field", "numbers"),
    [
        ("ExpertWeight", "weight", [ranges.WEIGHT.low, ranges.WEIGHT.high, ranges.LINEAR_WEIGHT.low]),
        ("ExpertWeight", "temperature", [ranges.EXPERT_TEMPERATURE.low, ranges.EXPERT_TEMPERATURE.high]),
        ("Sampling", "temperature", [ranges.TEMPERATURE.low, ranges.TEMPERATURE.high, ranges.GREEDY_BELOW]),
        ("GenerateRequest", "draft_tokens", [ranges.DRAFT_TOKENS.high]),
        ("GenerateRequest", "epsilon", [ranges.EPSILON.low, ranges.EPSILON.high]),
        ("GenerateRequest", "max_bytes", [ranges.MAX_BYTES.low]),
        ("GenerateRequest", "max_tokens", [ranges.MAX_TOKENS.low]),
        ("Sampling", "top_p", [ranges.TOP_P.low, ranges.TOP_P.high]),
        ("Sampling", "min_p", [ranges.MIN_P.low, ranges.MIN_P.high]),
    ],
)
def test_the_protocol_says_the_bounds(message: str, field: str, numbers: list[float]) -> None:
    proto = (ROOT / "protos/token_swarm/v1/swarm.proto").read_text()
    body = proto.split(f"message {message} {{")[1].split("\n}")[0]
    found = re.search(rf"((?:  //.*\n)+)  (?:optional )?\w+ {field} = ", body)
    assert found is not None
    said = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", found[1])}
    assert said >= {float(number) for number in numbers}, found[1]


@pytest.mark.parametrize("own", ALL, ids=lambda own: own.field)
def test_nothing_outside_is_in_a_range(own: ranges.Range) -> None:
    assert math.nan not in own
    assert math.inf not in own
    assert -math.inf not in own
    assert (own.low in own) is not own.low_open
    assert (own.high in own) is not own.high_open
    with pytest.raises(BadParameter, match=re.escape(own.interval)):
        own.require(math.nan)


def test_a_temperature_below_the_threshold_is_greedy() -> None:
    assert Sampling(temperature=ranges.GREEDY_BELOW / 2).greedy
    assert not Sampling(temperature=ranges.GREEDY_BELOW).greedy


def test_weights_that_cancel_but_for_rounding_are_not_divided_by_what_is_left() -> None:
    assert 0.1 + 0.2 - 0.3 != 0
    assert split_weights([0.1, 0.2, -0.3], Rule.LOG_LINEAR, alone=False) == (1.0, (0.1, 0.2, -0.3))


def test_a_mixture_without_an_expert_stays_in_range() -> None:
    mixture = Mixture({"a": 1.0, "b": 1.0, "c": -1.0 + 1e-9})
    assert mixture.without(["a"]).weights == {"b": 1.0, "c": -1.0 + 1e-9}


def test_a_high_temperature_reaches_what_float32_has_no_room_for() -> None:
    logits = torch.tensor([0.0, -200.0, -50.0])
    vocabulary = Vocabulary((b"a", b"b", b"c"), ())
    toy = ToyExpert("e0", vocabulary)
    group = make_groups({"e0": toy.spec}, Mixture({"e0": 1.0}))[0]
    unit = TokenUnit(group, (0,), Sampling(temperature=100.0))
    unit.feed(unit.due()[0], [logits])
    assert unit._law is not None
    torch.testing.assert_close(unit._law.double(), torch.softmax(logits.double() / 100, 0))
