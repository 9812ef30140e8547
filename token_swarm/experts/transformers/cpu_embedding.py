"""The embedding of a model on a CPU: rows of a table that bfloat16 keeps, and that may be the last layer's own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from token_swarm.experts.transformers.cpu_linear import PackedLinear
from token_swarm.kernels.linear import holds_in_bfloat16

_PROBE = 64
"""Tokens on which an embedding is looked at."""


class Table(Protocol):
    """A matrix of which rows can be had."""

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rows, int64 [n], in float32: [n, width]."""
        ...


class Bfloat16Table:
    """A float32 matrix that bfloat16 keeps, in 2 bytes a number."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.bfloat16()

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds."""
        return self._weight.nbytes

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Table.rows`."""
        return self._weight[outputs].float()


class PackedEmbedding(nn.Module):
    """A float32 embedding of `count` tokens: a table's rows times `scale`."""

    def __init__(self, table: Table, count: int, scale: float) -> None:
        super().__init__()
        self.num_embeddings, self._table, self._scale = count, table, scale

    @property
    def nbytes(self) -> int:
        """Bytes that the embedding holds; 0 where the last layer has its table."""
        return self._table.nbytes if isinstance(self._table, Bfloat16Table) else 0

    @property
    def weight(self) -> torch.Tensor:
        """The table, float32 [tokens, width], made anew at every call."""
        return self._table.rows(torch.arange(self.num_embeddings))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> float32 [..., width]."""
        rows = self._table.rows(ids.flatten())
        return (rows if self._scale == 1.0 else rows * self._scale).view(*ids.shape, -1)


def pack_embedding(model: Any, tied: bool) -> None:
    """Replace the float32 embedding of `model`, whose linear layers are packed, where bfloat16 keeps it.

    `tied`: whether its weight was that of the last layer, which then has the only copy.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return
    weight = embedding.weight.detach()
    if weight.dtype != torch.float32 or not ((tied and isinstance(head, PackedLinear)) or holds_in_bfloat16(weight)):
        return
    table: Table = head if tied and isinstance(head, PackedLinear) else Bfloat16Table(weight)
    # Gemma's multiplies by the root of the width, in a class of its own.
    scale = float(getattr(embedding, "embed_scale", 1.0))
    packed = PackedEmbedding(table, weight.shape[0], scale)
    probe = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // _PROBE))
    with torch.inference_mode():
        if torch.equal(packed(probe), embedding(probe)):
            model.set_input_embeddings(packed)
