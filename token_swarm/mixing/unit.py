"""What a decoder sees of an ensemble: histories that need a forward, and stretches of text chosen in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from token_swarm.mixing.groups import Group, Unit
from token_swarm.mixing.sampling import Sampler
from token_swarm.mixing.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A token history of one group that must be forwarded by every member before the law is known."""

    group: int
    tokens: tuple[int, ...]
    key: object


@dataclass
class Walk:
    """Text chosen without a forward in between.

    log_probs: natural log-probability of every symbol chosen, the end of the text included; shares: of each expert,
    summed over those symbols; certificate: largest total-variation bound at any of them.
    ended: the end of the text was chosen, or the experts' vocabularies have no continuation in common.
    """

    data: bytes = b""
    log_probs: list[float] = field(default_factory=list)
    shares: Mapping[str, float] = field(default_factory=dict)
    certificate: float = 0.0
    ended: bool = False


class MixingUnit(Protocol):
    """Mixes the groups' laws and chooses text from the mixture.

    `stopwatch`: what its feeds count in; its owner times the walks, and may put a stopwatch of its own here.
    """

    stopwatch: Stopwatch

    @property
    def kind(self) -> Unit:
        """What is mixed."""
        ...

    @property
    def groups(self) -> Sequence[Group]:
        """The groups that are mixed."""
        ...

    def due(self) -> list[Need]:
        """Histories to forward before `walk` may be called."""
        ...

    def ahead(self, need: Need, rows: Sequence[Tensor], stopwatch: Stopwatch) -> Callable[[], object] | None:
        """The part of `feed` that depends on nothing but its arguments, or None where there is none.

        It may run in any thread, at the same time as anything else that does not count in this `stopwatch`.
        """
        ...

    def feed(self, need: Need, rows: Sequence[Tensor], made: Any = None) -> None:
        """Logit rows [width] after the need's history, one per member of its group. `made`: what `ahead` returned."""
        ...

    def walk(self, sampler: Sampler, *, max_bytes: int, max_tokens: int | None) -> Walk:
        """Choose and append symbols until a forward is due, the text ends, or it has grown by `max_bytes`.

        Raises NoContinuation where the vocabularies have a continuation in common to which no expert gives any
        probability that the others do not exclude.

        A symbol that writes several bytes may exceed max_bytes. max_tokens: stop also when every group's own
        tokenization of the text, without the prompt, has that many tokens.
        """
        ...

    def history(self, group: int) -> tuple[int, ...]:
        """The likeliest tokens of the text so far in a group's own tokenization, the prompt included."""
        ...

    def own_tokens(self, group: int) -> int:
        """Number of a group's own tokens in the text so far that are complete, without the prompt's."""
        ...

    def fewest_tokens(self) -> int:
        """`own_tokens` of the group that needs fewest, among those that still take part."""
        ...

    @property
    def retired(self) -> float:
        """Probability that the text's own tokenization was given up on the way here."""
        ...


class SymbolUnit(MixingUnit, Protocol):
    """A unit that gives its law symbol by symbol; `walk_by_symbol` walks it."""

    @property
    def certificate(self) -> float:
        """Upper bound, at this position, of the total variation between any group's law and its exact law."""
        ...

    def law(self) -> npt.NDArray[Any]:
        """Probabilities of the next symbols, summing to 1; all zeros when nothing can follow."""
        ...

    def relaxed_law(self) -> npt.NDArray[Any]:
        """The law to choose by where `law` is all zeros; all zeros itself when nothing can follow."""
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


def walk_by_symbol(unit: SymbolUnit, sampler: Sampler, *, max_bytes: int, max_tokens: int | None) -> Walk:
    """`MixingUnit.walk`, one symbol after the other."""
    data, shares, walk = bytearray(), dict[str, float](), Walk()
    while not unit.due() and len(data) < max_bytes:
        law = unit.law()
        if not law.any() and not (law := unit.relaxed_law()).any():
            walk.ended = True
            break
        symbol = sampler.choose(law)
        walk.log_probs.append(float(np.log(law[symbol])) if law[symbol] > 0 else -np.inf)
        walk.certificate = max(walk.certificate, unit.certificate)
        for name, share in unit.shares(symbol).items():
            shares[name] = shares.get(name, 0.0) + share
        if unit.ends(symbol):
            walk.ended = True
            break
        data += unit.advance(symbol)
        if max_tokens is not None and unit.fewest_tokens() >= max_tokens:
            break
    walk.data, walk.shares = bytes(data), shares
    return walk
