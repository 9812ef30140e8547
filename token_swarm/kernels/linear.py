"""Products of a few rows with bfloat16 weights, in C++ (csrc/linear.cpp): as fast as memory gives the weights.

Measured on one core with AVX-512, weight [262144, 640], milliseconds for 1 / 4 / 8 / 16 / 32 rows: this 29 / 30 / 37 /
54 / 99, FBGEMM with float16 weights 34 / 41 / 48 / 85 / 142, `F.linear` with float32 weights at 16 and 32 rows 141 and
202. With the weights of a layer, [2048, 640], it is ahead of `F.linear` up to 256 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_swarm import memory
from token_swarm.kernels import native

_PANEL = 64
"""Outputs that lie together, as in csrc/linear.cpp."""
_BLOCK = 1024
"""Rows of a weight that are looked at together: they fit a cache, a vocabulary's weight takes seconds otherwise."""


def holds_in_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 keeps every value of `weight`, float32 [outputs, inputs]."""
    return all(torch.equal(block.bfloat16().float(), block) for block in torch.split(weight, _BLOCK))


class Bfloat16Linear:
    """A linear layer on the CPU, one thread. Sums are float32, in chains of at most 256 terms.

    A row is computed in the same way whatever other rows are asked for: its result is the same to the last bit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, order: Tensor | None = None) -> None:
        """`weight`: float32 [outputs, inputs], of which bfloat16 keeps every value; `bias`: float32 [outputs].

        `order`: int64 [outputs], which row of `weight`, and entry of `bias`, each output is. Raises RuntimeError where
        the kernels were not built.
        """
        self.outputs, self.inputs = weight.shape
        panels = -(-self.outputs // _PANEL)
        # Outputs 32 apart are side by side.
        self._pairs = torch.empty(panels, self.inputs, _PANEL // 2, 2, dtype=torch.bfloat16)
        order = None if order is None else order.contiguous()
        native.pack_linear(self.inputs, self.outputs, weight.contiguous(), order, self._pairs)
        self._bias = torch.zeros(panels * _PANEL)
        if bias is not None:
            self._bias[: self.outputs] = bias if order is None else bias[order]

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds."""
        return self._pairs.nbytes + self._bias.nbytes

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights of some outputs, int64 [n], as they were given: float32 [n, inputs]."""
        panel, place = outputs // _PANEL, outputs % _PANEL
        half = _PANEL // 2
        return self._pairs[panel, :, place % half, place // half].float()

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32 [..., inputs] -> [..., outputs]."""
        table = inputs.contiguous()
        rows = table.numel() // self.inputs
        out = memory.empty((*table.shape[:-1], self.outputs), torch.float32)
        native.linear(rows, self.inputs, self.outputs, self._pairs, self._bias, table, out)
        return out
