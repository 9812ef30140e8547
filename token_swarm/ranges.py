"""The range of every number in a request, in one table: what validation refuses by and what the documentation says.

Within its range a number gives what the definition gives, to the accuracy that tests/kernels/test_ranges.py states for
every implementation of the kernels; outside it is refused with the field, the value and the range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from token_swarm.errors import BadParameter


@dataclass(frozen=True)
class Range:
    """The values of one field: from `low` to `high`, each included unless it is open.

    field: its path in a request or in a configuration. meaning: what the number does. neutral: the value that does
    nothing, and what that means.
    """

    field: str
    low: float
    high: float
    meaning: str
    neutral: str
    low_open: bool = False
    high_open: bool = False
    integer: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a request may hold the value. NaN is in no range."""
        above = self.low < value if self.low_open else self.low <= value
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    @property
    def interval(self) -> str:
        """The bounds as mathematics writes them, such as (0, 1]."""
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{left}{_shown(self.low)}, {_shown(self.high)}{right}"

    @property
    def allowed(self) -> str:
        """What the field may hold, in words."""
        return f"{'an integer' if self.integer else 'a number'} in {self.interval}"

    def require(self, value: float, field: str | None = None) -> None:
        """Raise BadParameter for a value out of range. field: its path as the caller wrote it."""
        if value not in self:
            raise BadParameter(field or self.field, value, self.allowed)


def _shown(bound: float) -> str:
    if isinstance(bound, int) and bound.bit_length() > 31:
        power, rest = bound.bit_length(), 2 ** bound.bit_length() - bound
        return f"2^{power} - {rest}"
    return f"{bound:g}" if abs(bound) < 1e5 or math.isinf(bound) else f"{bound:,}".replace(",", " ")


GREEDY_BELOW = 1e-3
"""A sampling temperature below this is greedy. Mixed probabilities are right to 1e-5, and a temperature T multiplies
that by 1 / T: at 1e-3 the odds of two tokens are off by a hundredth at most, below it rounding would decide."""

WEIGHT = Range(
    "mixture.weights[].weight", -1000, 1000,
    "power that the expert's distribution is raised to, log-linear rule", "0: the expert is not run",
)  # fmt: skip
LINEAR_WEIGHT = Range(
    "mixture.weights[].weight", 0, 1000,
    "share of the expert, linear rule; divided by the sum of all", "0: the expert is not run",
)  # fmt: skip
EXPERT_TEMPERATURE = Range(
    "mixture.weights[].temperature", 0.05, 100,
    "what the expert's logits are divided by before mixing", "1: logits as they are",
)  # fmt: skip
TEMPERATURE = Range(
    "sampling.temperature", 0, 100,
    f"sharpness of the draw, 1 / T the power of the mixed probabilities; below {GREEDY_BELOW:g} greedy",
    "1: probabilities as they are",
)  # fmt: skip
TOP_K = Range(
    "sampling.top_k", 0, 2**32 - 1, "tokens that are kept, the most probable ones", "0: all tokens", integer=True
)
TOP_P = Range(
    "sampling.top_p", 0, 1, "mass that the most probable tokens have to reach", "1: all tokens", low_open=True
)
MIN_P = Range(
    "sampling.min_p", 0, 1, "least probability of a token, as a fraction of the most probable one's", "0: all tokens"
)
SEED = Range("sampling.seed", 0, 2**64 - 1, "seed of the draw", "absent: the server picks one", integer=True)
MAX_BYTES = Range("max_bytes", 1, 2**64 - 1, "most bytes of the text", "absent: see the message", integer=True)
MAX_TOKENS = Range("max_tokens", 1, 2**64 - 1, "most tokens of the text", "absent: no limit", integer=True)
EPSILON = Range(
    "epsilon", 0, 1, "total variation that cutting unlikely tokenizations may add", "0: none is cut", high_open=True
)
DRAFT_TOKENS = Range(
    "draft_tokens", 0, 16, "tokens that an expert may compute ahead of the text", "0: none", integer=True
)
WINDOW = Range(
    "coordinator.window", 1, 2**31 - 1, "bytes after which an unlikely tokenization is given up",
    "null: none is given up", integer=True,
)  # fmt: skip
SECONDS = Range(
    "coordinator.max_seconds", 0, 31_536_000, "seconds that a request may take, whatever deadline its call has",
    "none: there always is a limit", low_open=True,
)  # fmt: skip

REQUEST = (
    WEIGHT, LINEAR_WEIGHT, EXPERT_TEMPERATURE, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, MAX_BYTES, MAX_TOKENS, EPSILON,
    DRAFT_TOKENS,
)  # fmt: skip
"""What a caller of the server may set."""
ELSEWHERE = (WINDOW, SECONDS)
"""What bounds a request and is set by the server's configuration or by a user of the library."""


def table() -> str:
    """Markdown of all ranges, as docs/ranges.md shows it."""
    lines = ["| Field | Range | What it does | Neutral |", "|---|---|---|---|"]
    lines += [f"| `{own.field}` | {own.interval} | {own.meaning} | {own.neutral} |" for own in (*REQUEST, *ELSEWHERE)]
    return "\n".join(lines) + "\n"


CANCELLING = 1e-3
"""Weights of experts that share a vocabulary count as cancelling where their sum is below this part of the largest of
them: 0.1 + 0.2 - 0.3 is 5.6e-17, by which nothing can be divided."""


def cancel(weights: Sequence[float]) -> bool:
    """Whether the weights have no sum that they could be divided by."""
    return abs(sum(weights)) <= CANCELLING * max(map(abs, weights))
