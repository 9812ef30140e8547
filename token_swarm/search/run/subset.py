"""Some examples of a utility as a utility of their own: the dev and the test half of one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture
from token_swarm.search.utility import Evaluator, Scores, Utility, as_items


@dataclass(frozen=True)
class Subset:
    """Examples `indices` of the utility `whole`. Raises BadParameter for none, IndexError for one it does not have."""

    whole: Utility
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse an empty side of a split."""
        if not self.indices:
            raise BadParameter("indices", [], "at least one example")
        as_items(self.indices, self.whole.items)

    @property
    def name(self) -> str:
        """The whole's."""
        return self.whole.name

    @property
    def smooth(self) -> bool:
        """The whole's."""
        return self.whole.smooth

    @property
    def items(self) -> int:
        """Number of examples."""
        return len(self.indices)

    def evaluate(self, mixtures: Sequence[Mixture], items: Sequence[int] | None = None) -> Scores:
        """See `Utility.evaluate`."""
        return self.whole.evaluate(mixtures, self.of_whole(items))

    def of_whole(self, items: Sequence[int] | None) -> list[int]:
        """The numbers that `items` of this subset have in the whole."""
        return [self.indices[item] for item in as_items(items, len(self.indices))]


def evaluate(
    evaluator: Evaluator, utility: Utility, mixtures: Sequence[Mixture], items: Sequence[int] | None = None
) -> Scores:
    """`evaluator.evaluate`, to which both halves are one utility: it is sent to other processes once."""
    if isinstance(utility, Subset):
        return evaluator.evaluate(utility.whole, mixtures, utility.of_whole(items))
    return evaluator.evaluate(utility, mixtures, items)
