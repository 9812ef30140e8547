"""What a caller may ask of a decode, checked once at the door."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from token_swarm.errors import BadParameter
from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW, MOST_DRAFT_TOKENS
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling


class FinishReason(enum.Enum):
    """Why a text ended."""

    END_OF_TEXT = "end_of_text"
    STOP_STRING = "stop_string"
    MAX_BYTES = "max_bytes"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"


@dataclass(frozen=True)
class DecodeRequest:
    """How to continue a prompt.

    max_tokens counts the tokens of the expert that needs fewest, max_bytes the bytes of the text; the first limit
    reached ends it. Stop strings are matched on bytes and are not part of the text. epsilon and window: see
    `token_swarm.mixing.byte_group`. draft_tokens: most tokens that each expert forwards beyond what the text needs at
    that point, see `token_swarm.decoding.drafts`; the text is the same.
    """

    sampling: Sampling = field(default_factory=Sampling)
    unit: Unit = Unit.AUTO
    seed: int = 0
    max_bytes: int | None = None
    max_tokens: int | None = None
    stop: tuple[bytes, ...] = ()
    epsilon: float = DEFAULT_EPSILON
    window: int | None = DEFAULT_WINDOW
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("max_bytes", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadParameter(name, value, "an integer >= 1")
        if any(not stop for stop in self.stop):
            raise BadParameter("stop", "", "non-empty strings")
        if not (math.isfinite(self.epsilon) and 0 <= self.epsilon < 1):
            raise BadParameter("epsilon", self.epsilon, "a number in [0, 1)")
        if self.window is not None and self.window < 1:
            raise BadParameter("window", self.window, "an integer >= 1")
        if not 0 <= self.draft_tokens <= MOST_DRAFT_TOKENS:
            raise BadParameter("draft_tokens", self.draft_tokens, f"an integer in [0, {MOST_DRAFT_TOKENS}]")
        if not 0 <= self.seed < 2**64:
            raise BadParameter("seed", self.seed, "an integer in [0, 2^64)")
