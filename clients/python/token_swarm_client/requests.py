"""Keyword arguments as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from token_swarm_client._v1 import swarm_pb2

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


class MixtureOptions(TypedDict, total=False):
    """How the experts are mixed: a `particle` by its name, or `weights` by expert. Neither: the server's default."""

    particle: str
    weights: Mapping[str, float]
    rule: Literal["linear", "log_linear"]
    """Of `weights`; the server's default where it is absent."""
    expert_temperatures: Mapping[str, float]
    """Of the logits of experts in `weights`, before mixing."""


class GenerateOptions(MixtureOptions, total=False):
    """What a generation may ask for; what is absent is the server's default."""

    request_id: str
    chat: bool
    unit: Literal["auto", "token", "byte", "union"]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_bytes: int
    max_tokens: int
    stop: Sequence[str]
    epsilon: float
    on_expert_failure: Literal["wait", "fail", "drop"]
    draft_tokens: int


def generate_request(prompt: str, options: GenerateOptions) -> swarm_pb2.GenerateRequest:
    """Raises TypeError for options that do not exist, ValueError for values that no message can hold."""
    left: dict[str, Any] = dict(options)
    fields: dict[str, Any] = {"prompt": prompt, **_mixing(left)}
    sampling = {name: left.pop(name) for name in _SAMPLING if name in left}
    if sampling:
        fields["sampling"] = swarm_pb2.Sampling(**sampling)
    if "unit" in left:
        fields["unit"] = _value("unit", swarm_pb2.Unit, "UNIT_", left.pop("unit"))
    if "on_expert_failure" in left:
        policy = left.pop("on_expert_failure")
        fields["on_expert_failure"] = _value(
            "on_expert_failure", swarm_pb2.OnExpertFailure, "ON_EXPERT_FAILURE_", policy
        )
    if isinstance(left.get("stop"), str):
        left["stop"] = [left["stop"]]  # a string is a sequence of its letters
    _refuse_unknown(left, GenerateOptions)
    return swarm_pb2.GenerateRequest(**fields, **left)


def score_request(
    text: str, prompt: str, *, chat: bool, per_byte: bool, request_id: str, options: MixtureOptions
) -> swarm_pb2.ScoreRequest:
    """Raises as `generate_request`."""
    left: dict[str, Any] = dict(options)
    fields = _mixing(left)
    _refuse_unknown(left, ())
    return swarm_pb2.ScoreRequest(
        text=text, prompt=prompt, chat=chat, per_byte=per_byte, request_id=request_id, **fields
    )


def _mixing(options: dict[str, Any]) -> dict[str, Any]:
    """The part of a request that says how the experts are mixed; takes it out of `options`."""
    given = {name: options.pop(name) for name in MixtureOptions.__annotations__ if name in options}
    if "particle" in given:
        if len(given) > 1:
            raise ValueError("particle: it brings its own weights; give either particle or weights")
        return given
    if "weights" not in given:
        if given:
            raise ValueError(f"{next(iter(given))}: only together with weights")
        return {}
    weights, temperatures = given["weights"], given.get("expert_temperatures", {})
    for name in temperatures:
        if name not in weights:
            raise ValueError(f"expert_temperatures: {name!r} has no weight; weights has {', '.join(weights)}")
    mixture = swarm_pb2.Mixture(
        weights=[
            swarm_pb2.ExpertWeight(expert=name, weight=weight, temperature=temperatures.get(name))
            for name, weight in weights.items()
        ]
    )
    if "rule" in given:
        mixture.rule = _value("rule", swarm_pb2.Rule, "RULE_", given["rule"])
    return {"mixture": mixture}


def _value(field: str, enum: Any, prefix: str, name: str) -> Any:
    allowed = [
        each.removeprefix(prefix).lower()
        for each in enum.DESCRIPTOR.values_by_name
        if not each.endswith("_UNSPECIFIED")
    ]
    if name not in allowed:
        raise ValueError(f"{field}: {name!r} is not allowed; it must be one of {', '.join(allowed)}")
    return enum.Value(prefix + name.upper())


def _refuse_unknown(options: dict[str, Any], known: Any) -> None:
    names = getattr(known, "__annotations__", {})
    for name in options:
        if name not in names:
            raise TypeError(f"there is no option {name!r}")
