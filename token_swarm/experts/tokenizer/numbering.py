"""An expert's own token ids beside its model's.

An expert numbers its tokens in the order of their bytes, whatever its model does: those that begin with the same bytes
are neighbours in its logit rows, and a law over bytes reads a row from first to last. Putting 262,144 logits in that
order afterwards takes longer than the law itself; a model's last layer can have its outputs in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from token_swarm.experts.contract import Extend, Op, Open
from token_swarm.vocabulary import Vocabulary

_Op = TypeVar("_Op", bound=Op)


class Numbering:
    """Translates between the ids of an expert and of its model.

    `vocabulary`: in the expert's ids. `columns`: int64 [width], the model's id of each of the expert's ids, which is
    where its logit stands in a row of the model's.
    """

    def __init__(self, models: Vocabulary) -> None:
        """`models`: the vocabulary in the model's ids."""
        self.vocabulary, self.columns = models.in_byte_order()
        self._to_model: list[int] = self.columns.tolist()
        self._from_model: list[int] = np.argsort(self.columns).tolist()

    def to_model(self, tokens: Iterable[int]) -> tuple[int, ...]:
        """The model's ids of an expert's tokens."""
        return tuple([self._to_model[token] for token in tokens])

    def from_model(self, tokens: Iterable[int]) -> tuple[int, ...]:
        """The expert's ids of a model's tokens."""
        return tuple([self._from_model[token] for token in tokens])

    def op_to_model(self, op: _Op) -> _Op:
        """An operation on tokens of the expert that are in range, as one on tokens of its model."""
        return replace(op, tokens=self.to_model(op.tokens)) if isinstance(op, Open | Extend) else op
