"""What a caller may ask of a decode, checked once at the door."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from token_swarm import ranges
from token_swarm.errors import BadParameter
from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling

_ALLOWED = {
    "seed": ranges.SEED,
    "max_bytes": ranges.MAX_BYTES,
    "max_tokens": ranges.MAX_TOKENS,
    "epsilon": ranges.EPSILON,
    "window": ranges.WINDOW,
    "draft_tokens": ranges.DRAFT_TOKENS,
}


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
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) is not None:
                allowed.require(value, name)
        if any(not stop for stop in self.stop):
            raise BadParameter("stop", "", "non-empty strings")
