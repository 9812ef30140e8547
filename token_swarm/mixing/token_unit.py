"""The token unit: one group mixes whole tokens, as an ordinary ensemble does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
from torch import Tensor

from token_swarm.mixing.groups import Group, Unit
from token_swarm.mixing.shaping import Shaping
from token_swarm.mixing.unit import Need


class TokenUnit:
    """One group over one text. Symbols are token ids; the prompt keeps the expert's own encoding."""

    kind = Unit.TOKEN

    def __init__(self, group: Group, tokens: tuple[int, ...], shaping: Shaping) -> None:
        self.groups: Sequence[Group] = (group,)
        self._shaping = shaping
        self._tokens = tokens
        self._prompt_length = len(tokens)
        self._law: npt.NDArray[Any] | None = None
        self._members: list[Tensor] = []
        self._eos = frozenset(group.vocabulary.eos_ids)

    def due(self) -> list[Need]:
        """The whole history, once a token."""
        return [] if self._law is not None else [Need(0, self._tokens, None)]

    def feed(self, need: Need, rows: Sequence[Tensor]) -> None:
        """Mix the members' rows into the law of the next token."""
        group = self.groups[need.group]
        self._law = self._shaping.apply(group.token_law(rows)).numpy()
        self._members = group.member_laws(rows) if len(rows) > 1 else []

    def law(self) -> npt.NDArray[Any]:
        """Probabilities over token ids: [width]."""
        if self._law is None:
            raise RuntimeError("the history has not been forwarded: feed what `due` names first")
        return self._law

    def ends(self, symbol: int) -> bool:
        """Whether the token ends the text."""
        return symbol in self._eos

    def advance(self, symbol: int) -> bytes:
        """Append one token."""
        self._tokens = (*self._tokens, symbol)
        self._law = None
        return self.groups[0].vocabulary.token_bytes[symbol] or b""

    def shares(self, symbol: int) -> dict[str, float]:
        """Posterior share of each member in the chosen token."""
        group = self.groups[0]
        if not self._members:
            return {group.names[0]: 1.0}
        return group.split([float(law[symbol]) for law in self._members])

    def history(self, group: int) -> tuple[int, ...]:
        """The tokens themselves: the token unit knows no other tokenization."""
        del group
        return self._tokens

    def own_tokens(self, group: int) -> int:
        """Tokens appended to the prompt."""
        del group
        return len(self._tokens) - self._prompt_length

    @property
    def certificate(self) -> float:
        """0: nothing is left out."""
        return 0.0

    @property
    def retired(self) -> float:
        """0: nothing is given up."""
        return 0.0
