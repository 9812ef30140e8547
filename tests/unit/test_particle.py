from __future__ import annotations

import json
from pathlib import Path

import pytest

from token_swarm.errors import BadParameter, FingerprintMismatch, UnknownName
from token_swarm.particle import Mixture, Particle, Rule

PARTICLE = Particle(
    name="code",
    mixture=Mixture({"a": 1.2, "b": -0.2}, Rule.LOG_LINEAR, {"a": 0.9}),
    fingerprints={"a": "1" * 64},
    utility="loglikelihood",
    data_hash="d" * 64,
    seed=7,
    dev_score=-1.5,
    test_score=-1.6,
)


def test_round_trip(tmp_path: Path) -> None:
    PARTICLE.save(tmp_path / "deep" / "code.json")
    assert Particle.load(tmp_path / "deep" / "code.json") == PARTICLE
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["code.json"]


def test_a_particle_that_was_not_learned_says_so(tmp_path: Path) -> None:
    for undecided in (False, True):
        particle = Particle("tie", Mixture({"a": 1.0}), undecided=undecided)
        assert ("undecided" in particle.to_json()) == undecided
        particle.save(tmp_path / "tie.json")
        assert Particle.load(tmp_path / "tie.json") == particle


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"name": ""}, "name"),
        ({"rule": "cubic"}, "rule"),
        ({"weights": {"a": "1"}}, "weights"),
        ({"weights": {}}, "weights"),
        ({"weights": {"a": 0, "b": 0}}, "weights"),
        ({"weights": {"a": float("nan")}}, "weights[a]"),
        ({"temperatures": {"a": 0}}, "temperatures[a]"),
        ({"temperatures": {"c": 1.0}}, "temperatures[c]"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_artefact_names_the_field(change: dict[str, object], field: str) -> None:
    document = json.loads(PARTICLE.to_json()) | change
    with pytest.raises(BadParameter) as caught:
        Particle.from_json(json.dumps(document), source="code.json")
    assert field in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "1"])
def test_no_object_is_refused(text: str) -> None:
    with pytest.raises(BadParameter, match=r"code\.json"):
        Particle.from_json(text, source="code.json")


def test_linear_weights_must_not_be_negative() -> None:
    with pytest.raises(BadParameter, match=r"weights\[a\].*\[0, 1000\] under the linear rule"):
        Mixture({"a": -1.0, "b": 2.0}, Rule.LINEAR)


def test_other_experts_are_refused_by_name() -> None:
    PARTICLE.require_match({"a": "1" * 64, "b": "2" * 64})
    with pytest.raises(FingerprintMismatch, match=r"particle 'code'.*expert 'a'"):
        PARTICLE.require_match({"a": "3" * 64, "b": "2" * 64})
    with pytest.raises(UnknownName, match="expert"):
        PARTICLE.require_match({"a": "1" * 64})
