"""What a benchmark sends: the same prompts to the ensemble and to each expert alone, in turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from token_swarm.v1 import swarm_pb2
from token_swarm_server.benchmark.prompts import PASSAGE, prompt

ENSEMBLE = "ensemble"
"""Name of the mixture that was asked for, among those of each expert alone."""


@dataclass(frozen=True)
class Plan:
    """Requests of one shape. mixing: fields of a GenerateRequest that say how to mix; text: where prompts come from.

    temperature 0 is greedy: the same work in every run.
    """

    prompt_bytes: int
    max_bytes: int
    mixing: Mapping[str, Any] = field(default_factory=dict)
    unit: swarm_pb2.Unit.ValueType = swarm_pb2.UNIT_AUTO
    epsilon: float | None = None
    draft_tokens: int | None = None
    temperature: float = 0.0
    text: str = PASSAGE

    def mixtures(self, experts: Iterable[str], *, alone: bool) -> dict[str, dict[str, Any]]:
        """The fields of each mixture that takes a turn: the ensemble, and every expert by itself."""
        singles: dict[str, dict[str, Any]] = {}
        for name in experts if alone else ():
            weight = swarm_pb2.ExpertWeight(expert=name, weight=1.0)
            singles[name] = {"mixture": swarm_pb2.Mixture(rule=swarm_pb2.RULE_LINEAR, weights=[weight])}
        asked = {**self.mixing, "unit": self.unit}
        return {ENSEMBLE: asked, **singles}

    def request(self, fields: Mapping[str, Any], seed: int) -> swarm_pb2.GenerateRequest:
        """One request; `seed` chooses the prompt and the draw."""
        return swarm_pb2.GenerateRequest(
            prompt=prompt(self.prompt_bytes, seed, self.text),
            sampling=swarm_pb2.Sampling(temperature=self.temperature, seed=seed % 2**64),
            max_bytes=self.max_bytes,
            epsilon=self.epsilon,
            draft_tokens=self.draft_tokens,
            **fields,
        )
