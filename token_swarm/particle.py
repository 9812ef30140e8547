"""Particles: how an ensemble is mixed, and the JSON artefact that carries it from the search to the server."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from token_swarm import ranges
from token_swarm.errors import BadParameter, FingerprintMismatch, UnknownName
from token_swarm.files import replacing
from token_swarm.rules import RULES, Rule

__all__ = ["SCHEMA_VERSION", "Mixture", "Particle", "Rule"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Mixture:
    """The mixing parameters themselves: a weight per expert, the rule, a temperature per expert.

    Raises BadParameter for weights or temperatures that define no distribution or are out of range.
    """

    weights: Mapping[str, float]
    rule: Rule = Rule.LOG_LINEAR
    temperatures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what does not define a distribution."""
        if not self.weights:
            raise BadParameter("weights", "{}", "at least one expert=weight")
        for name, weight in self.weights.items():
            ranges.WEIGHT.require(weight, f"weights[{name}]")
            if self.rule.normalised and weight not in ranges.LINEAR_WEIGHT:
                allowed = f"{ranges.LINEAR_WEIGHT.allowed} under the {self.rule.value} rule (log-linear takes any sign)"
                raise BadParameter(f"weights[{name}]", weight, allowed)
        if not any(self.weights.values()):
            raise BadParameter("weights", dict(self.weights), "at least one weight that is not 0")
        for name, temperature in self.temperatures.items():
            ranges.EXPERT_TEMPERATURE.require(temperature, f"temperatures[{name}]")
            if name not in self.weights:
                raise BadParameter(f"temperatures[{name}]", temperature, "an expert that has a weight")

    @property
    def active(self) -> dict[str, float]:
        """Weights of the experts that are run: those that are not 0."""
        return {name: weight for name, weight in self.weights.items() if weight != 0}

    def without(self, names: Collection[str]) -> Mixture:
        """The mixture of the other experts, scaled so that their weights add up to what all did, if that leaves them in
        range. Raises BadParameter when no expert is left."""
        left = {name: weight for name, weight in self.active.items() if name not in names}
        whole, part = sum(self.active.values()), sum(left.values())
        scale = whole / part if whole and part else 1.0
        if any(weight * scale not in ranges.WEIGHT for weight in left.values()):
            scale = 1.0  # weights that cancel
        temperatures = {name: value for name, value in self.temperatures.items() if name in left}
        return Mixture({name: weight * scale for name, weight in left.items()}, self.rule, temperatures)

    def require_known(self, experts: Mapping[str, object]) -> None:
        """Raise UnknownName when a weight names an expert that does not exist."""
        for name in self.weights:
            if name not in experts:
                raise UnknownName("expert", name, experts)


@dataclass(frozen=True)
class Particle:
    """A named mixture with its provenance: the artefact of a search."""

    name: str
    mixture: Mixture
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    utility: str | None = None
    data_hash: str | None = None
    seed: int | None = None
    dev_score: float | None = None
    test_score: float | None = None
    undecided: bool = False
    """Nothing was learned: all particles of the search had one score."""

    def require_match(self, running: Mapping[str, str]) -> None:
        """Raise when this particle was made for other experts than the `running` name -> fingerprint.

        UnknownName for an expert that does not run, FingerprintMismatch for one with another vocabulary.
        """
        self.mixture.require_known(running)
        for name, fingerprint in self.fingerprints.items():
            if name in running and running[name] != fingerprint:
                raise FingerprintMismatch(self.name, name, fingerprint, running[name])

    def to_json(self) -> str:
        """The artefact's text."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "rule": self.mixture.rule.value,
            "weights": dict(self.mixture.weights),
            "temperatures": dict(self.mixture.temperatures),
            **{key: value for key, value in asdict(self).items() if key not in ("name", "mixture", "undecided")},
            **({"undecided": True} if self.undecided else {}),
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "particle") -> Particle:
        """Read an artefact; BadParameter names the field of `source` that is wrong."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadParameter(source, f"line {error.lineno}: {error.msg}", "a JSON object") from error
        if not isinstance(document, dict):
            raise BadParameter(source, type(document).__name__, "a JSON object")
        known = {
            "schema_version", "name", "rule", "weights", "temperatures", "fingerprints",
            "utility", "data_hash", "seed", "dev_score", "test_score", "undecided",
        }  # fmt: skip
        for key in document:
            if key not in known:
                raise BadParameter(f"{source}: {key}", document[key], f"one of the fields {sorted(known)}")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise BadParameter(f"{source}: schema_version", document.get("schema_version"), str(SCHEMA_VERSION))
        name = document.get("name")
        if not isinstance(name, str) or not name:
            raise BadParameter(f"{source}: name", name, "a non-empty string")
        if document.get("rule") not in RULES.names():
            raise BadParameter(f"{source}: rule", document.get("rule"), f"one of {list(RULES.names())}")
        mixture = Mixture(
            weights=_numbers(document, "weights", source),
            rule=Rule(document["rule"]),
            temperatures=_numbers(document, "temperatures", source),
        )
        provenance = {key: document[key] for key in known & document.keys() - {"schema_version", "rule"}}
        for key in ("name", "weights", "temperatures"):
            provenance.pop(key, None)
        return cls(name=name, mixture=mixture, **provenance)

    def save(self, path: Path) -> None:
        """Write the artefact; a reader sees the old file or the whole new one."""
        with replacing(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Particle:
        """Read the artefact at `path`."""
        return cls.from_json(path.read_text(encoding="utf-8"), source=path.name)


def _numbers(document: Mapping[str, Any], key: str, source: str) -> dict[str, float]:
    table = document.get(key, {})
    if not isinstance(table, dict) or not all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in table.values()
    ):
        raise BadParameter(f"{source}: {key}", table, "an object of expert name -> number")
    return {name: float(value) for name, value in table.items()}
