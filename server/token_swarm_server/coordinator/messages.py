"""Public protobuf messages <-> the library's dataclasses; one function each way."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.decoding.score import Score
from token_swarm.errors import BadParameter
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Particle, Rule
from token_swarm.v1 import swarm_pb2
from token_swarm_server.coordinator.engine import Finished
from token_swarm_server.coordinator.expert.link import ExpertLink, LinkState
from token_swarm_server.coordinator.recovery import OnFailure
from token_swarm_server.telemetry.breakdown import breakdown_to_proto

RULES = {Rule.LINEAR: swarm_pb2.RULE_LINEAR, Rule.LOG_LINEAR: swarm_pb2.RULE_LOG_LINEAR}
UNITS = {unit: swarm_pb2.Unit.Value(f"UNIT_{unit.name}") for unit in Unit}
REASONS = {reason: swarm_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}") for reason in FinishReason}
STATES = {LinkState.READY: swarm_pb2.EXPERT_STATE_READY, LinkState.DOWN: swarm_pb2.EXPERT_STATE_DOWN}
_POLICY_OF = {swarm_pb2.ON_EXPERT_FAILURE_UNSPECIFIED: OnFailure.WAIT} | {
    swarm_pb2.OnExpertFailure.Value(f"ON_EXPERT_FAILURE_{policy.name}"): policy for policy in OnFailure
}
_RULE_OF = {value: rule for rule, value in RULES.items()}
_UNIT_OF = {swarm_pb2.UNIT_UNSPECIFIED: Unit.AUTO} | {value: unit for unit, value in UNITS.items()}


def mixture_from_proto(message: swarm_pb2.Mixture, default_rule: Rule) -> Mixture:
    """Raises BadParameter for weights that define no distribution, and for an expert named twice."""
    weights: dict[str, float] = {}
    temperatures: dict[str, float] = {}
    for entry in message.weights:
        if entry.expert in weights:
            raise BadParameter(f"mixture.weights[{entry.expert}]", entry.weight, "given once per expert")
        weights[entry.expert] = entry.weight
        if entry.HasField("temperature"):
            temperatures[entry.expert] = entry.temperature
    if message.rule not in (swarm_pb2.RULE_UNSPECIFIED, *_RULE_OF):
        raise BadParameter("mixture.rule", message.rule, f"one of {sorted(_RULE_OF)}")
    return Mixture(weights, _RULE_OF.get(message.rule, default_rule), temperatures)


def mixture_to_proto(mixture: Mixture) -> swarm_pb2.Mixture:
    """A mixture as a message. A rule that is not built in is left open: messages have no name for it."""
    weights = [
        swarm_pb2.ExpertWeight(expert=name, weight=weight, temperature=mixture.temperatures.get(name))
        for name, weight in mixture.weights.items()
    ]
    return swarm_pb2.Mixture(rule=RULES.get(mixture.rule, swarm_pb2.RULE_UNSPECIFIED), weights=weights)


def request_from_proto(
    message: swarm_pb2.GenerateRequest,
    *,
    epsilon: float,
    window: int | None,
    draft_tokens: int,
    default_max_bytes: int,
) -> DecodeRequest:
    """How to decode; what the message leaves open gets the server's defaults, the seed a random one.

    Raises BadParameter.
    """
    if message.unit not in _UNIT_OF:
        raise BadParameter("unit", message.unit, f"one of {sorted(_UNIT_OF)}")
    asked = message.sampling

    def given(field: str, default: float) -> float:
        return float(getattr(asked, field)) if asked.HasField(field) else default  # type: ignore[arg-type]

    sampling = Sampling(
        temperature=given("temperature", 1.0),
        top_k=asked.top_k if asked.HasField("top_k") else 0,
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
    )
    limited = message.HasField("max_bytes") or message.HasField("max_tokens")
    return DecodeRequest(
        sampling=sampling,
        unit=_UNIT_OF[message.unit],
        seed=asked.seed if asked.HasField("seed") else secrets.randbits(63),
        max_bytes=message.max_bytes if message.HasField("max_bytes") else (None if limited else default_max_bytes),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stop=tuple(stop.encode() for stop in message.stop),
        epsilon=message.epsilon if message.HasField("epsilon") else epsilon,
        window=window,
        draft_tokens=message.draft_tokens if message.HasField("draft_tokens") else draft_tokens,
    )


def policy_from_proto(value: swarm_pb2.OnExpertFailure.ValueType) -> OnFailure:
    """Raises BadParameter for a policy that does not exist."""
    if value not in _POLICY_OF:
        raise BadParameter("on_expert_failure", value, f"one of {sorted(_POLICY_OF)}")
    return _POLICY_OF[value]


def finish_to_proto(finished: Finished, request: DecodeRequest) -> swarm_pb2.Finish:
    """The final message of a stream."""
    finish = finished.finish
    return swarm_pb2.Finish(
        reason=REASONS[finish.reason],
        stop=None if finish.stop is None else finish.stop.decode(),
        bytes=finish.length,
        experts=[
            swarm_pb2.ExpertUsage(
                expert=name,
                tokens=use.tokens,
                forwards=use.forwards,
                wasted_forwards=use.wasted,
                share=use.share,
                draft_tokens=use.drafted,
                accepted_draft_tokens=use.accepted,
            )
            for name, use in finish.experts.items()
        ],
        timings=swarm_pb2.Timings(
            queue_seconds=finished.queue,
            first_byte_seconds=finished.first_byte,
            total_seconds=finished.total,
            breakdown=breakdown_to_proto(finished.parts, finished.forwards),
        ),
        seed=None if request.sampling.greedy else request.seed,
        certificate=finish.certificate,
        retired=finish.retired,
        unit=UNITS[finished.unit],
        dropped=finished.dropped,
        reopened=finished.reopened,
    )


def score_to_proto(score: Score, *, per_byte: bool) -> swarm_pb2.ScoreResponse:
    """Log-probabilities in nats."""
    return swarm_pb2.ScoreResponse(
        bytes=score.length,
        log_prob=score.log_prob,
        byte_log_probs=score.per_byte if per_byte else (),
        experts=[
            swarm_pb2.ExpertScore(
                expert=name,
                log_prob=expert.log_prob,
                byte_log_probs=expert.per_byte if per_byte else (),
                tokens=expert.tokens,
                token_log_prob=expert.token_log_prob,
            )
            for name, expert in score.experts.items()
        ],
        retired=score.retired,
        stride=score.stride,
        windows=[
            swarm_pb2.ScoreWindow(start=own.start, bytes=own.length, context_bytes=own.context) for own in score.windows
        ],
    )


def expert_to_proto(link: ExpertLink, group: int) -> swarm_pb2.ExpertInfo:
    """What a caller may know of an expert."""
    spec = link.spec
    return swarm_pb2.ExpertInfo(
        name=spec.name,
        architecture=spec.architecture,
        vocabulary_size=spec.vocabulary.width,
        fingerprint=spec.vocabulary.fingerprint,
        group=group,
        max_context=spec.max_context,
        dtype=str(spec.dtype).removeprefix("torch."),
        state=STATES[link.state],
        reason=link.reason,
        restarts=link.restarts,
        has_chat_template=spec.has_chat_template,
    )


def particles_to_proto(particles: Iterable[Particle]) -> swarm_pb2.ListParticlesResponse:
    """Every particle with its provenance."""
    return swarm_pb2.ListParticlesResponse(
        particles=[
            swarm_pb2.ParticleInfo(
                name=particle.name,
                mixture=mixture_to_proto(particle.mixture),
                utility=particle.utility or "",
                dev_score=particle.dev_score,
                test_score=particle.test_score,
            )
            for particle in particles
        ]
    )
