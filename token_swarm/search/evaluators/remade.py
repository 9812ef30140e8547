"""A utility that cannot be sent to another process, such as one that holds models."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.utility import Scores, Utility


class Remade:
    """Every process makes the utility for itself, when it is first asked.

    factory: picklable, such as a `functools.partial` of a function of a module. The rest is what the utility that it
    makes says of itself, so that the process that searches need not make it.
    """

    def __init__(self, factory: Callable[[], Utility], *, name: str, smooth: bool, items: int) -> None:
        self.name, self.smooth, self.items = name, smooth, items
        self.by_items = True
        self._factory = factory
        self._made: Utility | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what was made."""
        return _remade, (self._factory, self.name, self.smooth, self.items)

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`. Raises ValueError when the utility is not as it was announced."""
        if self._made is None:
            made = self._factory()
            if (made.name, made.items) != (self.name, self.items):
                told = f"{self.name!r} of {self.items} examples"
                raise ValueError(f"factory: it made {made.name!r} of {made.items} examples, not {told}")
            self._made = made
        return self._made.evaluate(mixtures, items)


def _remade(factory: Callable[[], Utility], name: str, smooth: bool, items: int) -> Remade:
    return Remade(factory, name=name, smooth=smooth, items=items)


def packed(utility: Utility) -> bytes:
    """The utility as another process receives it. Raises BadParameter for one that cannot be sent."""
    try:
        return pickle.dumps(utility)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        allowed = f"one that can be pickled: wrap it in token_swarm.search.evaluators.Remade ({error})"
        raise BadParameter("utility", utility.name, allowed) from error
