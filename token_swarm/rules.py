"""Mixing rules: how several distributions become one. Two are built in; entry points in `token_swarm.rules` add others.

A rule is one object, `RuleKind`: what weights it takes, and the combination in log space. The built-in rules have
kernels as well, which compute the same; the others run that combination in float64 torch, wherever distributions are
mixed: inside a group by token, across groups by byte, over a union of vocabularies, and in the score cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from token_swarm.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RuleKind:
    """What a rule does.

    combine: (log_probs [members, ..., symbols], weights [members]), both float64, weights not 0 -> [..., symbols]: the
    log of something proportional to the mixture, -inf (or NaN) where a symbol is impossible. One member of weight 1 has
    to be the mixture by itself. normalised: weights are non-negative, and `combine` gets them divided by their sum;
    otherwise they have any sign and come as given. kernel: kernels know the rule too.
    """

    combine: Callable[[Tensor, Tensor], Tensor]
    normalised: bool
    kernel: bool = False


def _linear(log_probs: Tensor, weights: Tensor) -> Tensor:
    return (log_probs + _column(weights, log_probs).log()).logsumexp(0)


def _log_linear(log_probs: Tensor, weights: Tensor) -> Tensor:
    joint = (_column(weights, log_probs) * log_probs).sum(0)
    return joint.masked_fill(~log_probs.isfinite().all(0), -float("inf"))


def _column(weights: Tensor, log_probs: Tensor) -> Tensor:
    """weights [members], beside log_probs [members, ...]."""
    return weights.reshape(-1, *(1 for _ in log_probs.shape[1:]))


LINEAR = RuleKind(_linear, normalised=True, kernel=True)
LOG_LINEAR = RuleKind(_log_linear, normalised=False, kernel=True)
RULES = Registry("rule", "token_swarm.rules", {"linear": f"{__name__}:LINEAR", "log-linear": f"{__name__}:LOG_LINEAR"})


class _RuleType(type):
    """`Rule` is a collection, that of the built-in rules."""

    def __iter__(cls) -> Iterator[Rule]:
        yield from (Rule.LINEAR, Rule.LOG_LINEAR)

    def __len__(cls) -> int:
        return 2

    def __contains__(cls, rule: object) -> bool:
        return rule in (Rule.LINEAR, Rule.LOG_LINEAR)


class Rule(metaclass=_RuleType):
    """A rule by name; there is one object of each.

    Raises UnknownName for a rule that is not there, PluginError for one of another distribution that cannot be used.
    """

    LINEAR: ClassVar[Rule]
    """Weighted arithmetic mean; weights are non-negative and are divided by their sum."""
    LOG_LINEAR: ClassVar[Rule]
    """Weighted product of experts; weights may be negative and are used as given."""

    value: str
    """Its name, as configurations and particles have it."""
    kind: RuleKind
    _made: ClassVar[dict[str, Rule]] = {}

    def __new__(cls, value: str) -> Rule:
        """The rule called `value`."""
        if value not in cls._made:
            kind = RULES.load(value)
            if not RULES.is_built_in(value):
                _require_contract(value, kind)
            rule = super().__new__(cls)
            rule.value, rule.kind = value, kind
            cls._made[value] = rule
        return cls._made[value]

    @property
    def normalised(self) -> bool:
        """Whether weights are non-negative and divided by their sum."""
        return self.kind.normalised

    @property
    def has_kernel(self) -> bool:
        """Whether kernels know it; otherwise `combine` is all there is."""
        return self.kind.kernel

    def combine(self, log_probs: Tensor, weights: Tensor) -> Tensor:
        """Log of something proportional to the mixture, [..., symbols], -inf where a symbol is impossible.

        log_probs: [members, ..., symbols]; weights: [members], any but 0.
        """
        weights = weights.double()
        joint = self.kind.combine(log_probs.double(), weights / weights.sum() if self.normalised else weights)
        return joint.nan_to_num(nan=-float("inf"), posinf=-float("inf"), neginf=-float("inf"))

    def __repr__(self) -> str:
        return f"Rule({self.value!r})"

    def __reduce__(self) -> tuple[type[Rule], tuple[str]]:
        """A copy, also one in another process, is the rule of that name there."""
        return Rule, (self.value,)


def _require_contract(name: str, kind: object) -> None:
    """Raise PluginError unless another distribution's rule is one."""
    if not isinstance(kind, RuleKind):
        raise RULES.broken(name, f"a rule is a RuleKind of token_swarm.rules, not a {type(kind).__name__}")
    if kind.kernel:
        raise RULES.broken(name, "kernel=True is for the built-in rules")
    import torch

    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], dtype=torch.float64)[None]
    try:
        alone = kind.combine(probabilities.log(), torch.ones(1, dtype=torch.float64))
        both = kind.combine(probabilities.log().transpose(0, 1), torch.full((2,), 0.5, dtype=torch.float64))
    except Exception as error:
        raise RULES.broken(name, f"combine fails: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if alone.shape != (2, 3) or both.shape != (1, 3):
        shapes = f"{list(alone.shape)} and {list(both.shape)}"
        raise RULES.broken(name, f"combine of [1, 2, 3] and [2, 1, 3] must give [2, 3] and [1, 3], not {shapes}")
    if not torch.allclose(alone.softmax(-1), probabilities[0], atol=1e-9):
        raise RULES.broken(name, "combine of one member with weight 1 must be that member")


Rule.LINEAR, Rule.LOG_LINEAR = Rule("linear"), Rule("log-linear")
