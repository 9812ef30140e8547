"""What a decoder sees of an ensemble: contexts that need a forward, and a law over the next symbol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt
from torch import Tensor

from token_swarm.mixing.groups import Group, Unit


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A token history of one group that must be forwarded by every member before the law is known."""

    group: int
    tokens: tuple[int, ...]
    key: object


class MixingUnit(Protocol):
    """Mixes the groups' laws symbol by symbol. A symbol is a byte (byte unit) or a token id (token unit)."""

    @property
    def kind(self) -> Unit:
        """What is mixed: tokens or bytes."""
        ...

    @property
    def groups(self) -> Sequence[Group]:
        """The groups that are mixed."""
        ...

    def due(self) -> list[Need]:
        """Histories to forward before `law` may be asked."""
        ...

    def feed(self, need: Need, rows: Sequence[Tensor]) -> None:
        """Logit rows [width] after the need's history, one per member of its group."""
        ...

    def law(self) -> npt.NDArray[Any]:
        """Probabilities of the next symbols, summing to 1; all zeros when nothing can follow."""
        ...

    def ends(self, symbol: int) -> bool:
        """Whether `symbol` ends the text."""
        ...

    def advance(self, symbol: int) -> bytes:
        """Append a symbol that does not end the text; returns the bytes it writes."""
        ...

    def shares(self, symbol: int) -> dict[str, float]:
        """How much of the chosen symbol's probability each expert gave; the values add up to 1."""
        ...

    def history(self, group: int) -> tuple[int, ...]:
        """The likeliest tokens of the text so far in a group's own tokenization, the prompt included."""
        ...

    def own_tokens(self, group: int) -> int:
        """Number of a group's own tokens in the text so far that are complete, without the prompt's."""
        ...

    @property
    def certificate(self) -> float:
        """Upper bound, at this position, of the total variation between any group's law and its exact law."""
        ...

    @property
    def retired(self) -> float:
        """Probability that the text's own tokenization was given up on the way here."""
        ...
