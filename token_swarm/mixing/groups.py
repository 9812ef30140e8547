"""Groups: experts that share a vocabulary, and the choice of what is mixed."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from token_swarm import kernels, ranges
from token_swarm.errors import BadLogits, BadParameter, NoContinuation
from token_swarm.experts.contract import ExpertSpec
from token_swarm.particle import Mixture, Rule
from token_swarm.vocabulary import Vocabulary


class Unit(enum.Enum):
    """What is mixed at a step."""

    AUTO = "auto"
    """`token` if the experts with non-zero weight form one group, else `byte`."""
    TOKEN = "token"
    BYTE = "byte"
    UNION = "union"
    """Tokens of all vocabularies as byte strings, each expert for itself: the GaC/UniTE approximation."""


@dataclass(frozen=True)
class Group:
    """Experts with one vocabulary and one canonical tokenization, and how they are mixed (DESIGN 3).

    `exponents[e]` is what member e's distribution is weighted with inside the group; `weight` is the group's
    weight across groups.
    """

    experts: tuple[ExpertSpec, ...]
    exponents: tuple[float, ...]
    temperatures: tuple[float, ...]
    weight: float
    rule: Rule

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary all members share."""
        return self.experts[0].vocabulary

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the members, in the order of the expert list."""
        return tuple(spec.name for spec in self.experts)

    @cached_property
    def _allowed(self) -> Tensor:
        return torch.from_numpy(self.vocabulary.allowed.copy())

    @cached_property
    def only_temperature(self) -> Tensor | None:
        """The temperature, float64 [1], at which the softmax of the only member's logits is the group's law."""
        if len(self.experts) > 1 or not self.rule.has_kernel:
            return None
        exponent = self.exponents[0] if self.rule is Rule.LOG_LINEAR else 1.0
        return torch.tensor([self.temperatures[0] / exponent], dtype=torch.float64) if exponent > 0 else None

    @cached_property
    def is_sharp(self) -> bool:
        """Whether the law is so much sharper than its members' that float32 would turn what is unlikely into 0."""
        linear = self.rule is Rule.LINEAR
        pairs = zip(self.exponents, self.temperatures, strict=True)
        return any((1.0 if linear else abs(exponent)) / heat > 4 for exponent, heat in pairs)

    def check(self, rows: Sequence[Tensor]) -> None:
        """Raise BadLogits unless the members' logit rows are [width] each."""
        for spec, row in zip(self.experts, rows, strict=True):
            if row.shape != (self.vocabulary.width,):
                shape = tuple(row.shape)
                raise BadLogits([spec.name], f"logit row of shape {shape}, not [{self.vocabulary.width}]")

    def token_law(self, rows: Sequence[Tensor]) -> Tensor:
        """Mix the members' logit rows ([width] each) into token probabilities: [width], summing to 1.

        Raises BadLogits for the members whose own logits are no distribution, and NoContinuation when all are but no
        token is left to which all of them give a probability.
        """
        self.check(rows)
        mixed = self._mix(rows, self._asked)
        if math.isnan(mixed.numpy()[0]):
            bad = [spec.name for spec, row in zip(self.experts, rows, strict=True) if not is_distribution(spec, row)]
            raise BadLogits(bad) if bad else NoContinuation(self.names)
        return mixed

    def token_log_law(self, rows: Sequence[Tensor]) -> npt.NDArray[np.float64]:
        """The logarithm of `token_law`, float64 [width], for laws too sharp for probabilities. Raises as it."""
        self.check(rows)
        bad = [spec.name for spec, row in zip(self.experts, rows, strict=True) if not is_distribution(spec, row)]
        if bad:
            raise BadLogits(bad)
        logs = torch.stack(
            [
                torch.log_softmax(torch.where(self._allowed, row.cpu().double(), -torch.inf) / heat, dim=0)
                for row, heat in zip(rows, self.temperatures, strict=True)
            ]
        )
        if not self.rule.has_kernel:
            joint = self.rule.combine(logs, torch.tensor(self.exponents, dtype=torch.float64))
            if not bool((joint > -torch.inf).any()):
                raise NoContinuation(self.names)
            return np.asarray(torch.log_softmax(joint, 0).numpy(), dtype=np.float64)
        powers = torch.tensor(self.exponents, dtype=torch.float64)[:, None]
        if self.rule is Rule.LINEAR:
            return np.asarray(torch.logsumexp(logs + powers.log(), 0).numpy(), dtype=np.float64)
        possible = logs.isfinite().all(0)
        if not bool(possible.any()):
            raise NoContinuation(self.names)
        joint = torch.where(possible, (powers * torch.where(possible, logs, 0.0)).sum(0), -torch.inf)
        return np.asarray(torch.log_softmax(joint, 0).numpy(), dtype=np.float64)

    def member_laws(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Each member's own token probabilities at its temperature."""
        return [self._mix([row], asked) for row, asked in zip(rows, self._asked_alone, strict=True)]

    @cached_property
    def _asked(self) -> tuple[Tensor, Tensor]:
        """Weights inside the group and temperatures, [1, members] each."""
        return _row(self.exponents), _row(self.temperatures)

    @cached_property
    def _asked_alone(self) -> list[tuple[Tensor, Tensor]]:
        """The same for each member alone."""
        return [(_row([1.0]), _row([heat])) for heat in self.temperatures]

    def _mix(self, rows: Sequence[Tensor], asked: tuple[Tensor, Tensor]) -> Tensor:
        logits, (weights, temperatures), allowed = [row[None] for row in rows], asked, self._allowed
        device = rows[0].device
        if device.type == "cpu":
            # Nothing is moved, not even for nothing: every operation of torch lets another thread have the interpreter.
            return kernels.mix(logits, weights, temperatures, self.rule, allowed)[0]
        # Experts in this process may leave their logits on a GPU: they are mixed there, and only the mixture is moved.
        logits = [row.to(device) for row in logits]
        weights, temperatures, allowed = (table.to(device) for table in (weights, temperatures, allowed))
        return kernels.mix(logits, weights, temperatures, self.rule, allowed)[0].cpu()

    def split(self, masses: npt.ArrayLike) -> dict[str, float]:
        """Share of each member when they gave a symbol `masses` [members, or 1 for all], |exponent| as prior."""
        given = np.abs(self.exponents) * np.asarray(masses)
        return as_shares(dict(zip(self.names, given.tolist(), strict=True)))


def is_distribution(spec: ExpertSpec, row: Tensor) -> bool:
    """Whether logits [width] define a distribution: no NaN or +inf at an allowed token, and not all of them -inf."""
    allowed = torch.from_numpy(spec.vocabulary.allowed.copy()).to(row.device)
    return row.shape == allowed.shape and math.isfinite(float(row[allowed].amax()))


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def as_shares(given: Mapping[str, float]) -> dict[str, float]:
    """`given` scaled to add up to 1; equal shares when all of it is 0."""
    total = sum(given.values())
    return {name: value / total if total > 0 else 1 / len(given) for name, value in given.items()}


def make_groups(specs: Mapping[str, ExpertSpec], mixture: Mixture) -> tuple[Group, ...]:
    """Group the experts that `mixture` runs; experts with weight 0 take no part.

    The order of groups and members is that of `specs`, whatever the order of the weights, so that equal
    requests give equal results.
    """
    mixture.require_known(specs)
    active = mixture.active
    keyed: dict[tuple[str, str], list[ExpertSpec]] = {}
    for name, spec in specs.items():
        if name in active:
            keyed.setdefault((spec.vocabulary.fingerprint, spec.canonical), []).append(spec)
    total = sum(active.values()) if mixture.rule.normalised else 1.0
    groups = []
    for members in keyed.values():
        weights = [active[spec.name] for spec in members]
        temperatures = tuple(mixture.temperatures.get(spec.name, 1.0) for spec in members)
        weight, exponents = split_weights(weights, mixture.rule, alone=len(keyed) == 1)
        groups.append(Group(tuple(members), exponents, temperatures, weight / total, mixture.rule))
    return tuple(groups)


def make_rows(specs: Mapping[str, ExpertSpec], mixture: Mixture) -> tuple[Group, ...]:
    """A group for each expert that `mixture` runs, whatever it shares with others, with the weight as given.

    What the union unit mixes; the order is that of `specs`.
    """
    mixture.require_known(specs)
    active = mixture.active
    total = sum(active.values()) if mixture.rule.normalised else 1.0
    return tuple(
        Group((spec,), (1.0,), (mixture.temperatures.get(name, 1.0),), active[name] / total, mixture.rule)
        for name, spec in specs.items()
        if name in active
    )


def split_weights(weights: Sequence[float], rule: Rule, *, alone: bool) -> tuple[float, tuple[float, ...]]:
    """(weight across groups, weights inside the group) of a group's members."""
    total = sum(weights)
    if not rule.normalised and (alone or ranges.cancel(weights)):
        # A single group is the plain product of experts; weights that cancel have no mean to be divided by.
        return 1.0, tuple(weights)
    return total, tuple(weight / total for weight in weights)


def resolve_unit(unit: Unit, groups: Sequence[Group]) -> Unit:
    """What is really mixed: one group always mixes tokens, which is the same law and exact by construction.

    So does the union of a single expert; that of several stays one even if they form one group.
    Raises BadParameter when `token` is asked for across vocabularies.
    """
    if unit is Unit.UNION and sum(len(group.experts) for group in groups) > 1:
        return Unit.UNION
    if len(groups) == 1:
        return Unit.TOKEN
    if unit is Unit.TOKEN:
        names = " | ".join("+".join(group.names) for group in groups)
        allowed = f"'byte', 'union' or 'auto': the experts have different vocabularies ({names})"
        raise BadParameter("unit", "token", allowed)
    return Unit.BYTE
