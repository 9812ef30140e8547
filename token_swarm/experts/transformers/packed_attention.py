"""Attention over a packed batch: the new tokens of many sequences in one row, each attending to its own slot.

The model sees an input of shape [1, N] and no padding; its linear layers work on N rows. Only attention knows
that the rows belong to different sequences: it takes each run of rows to the KV of that run's slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "token_swarm_packed"
"""Name under which the attention is known to transformers. It has no mask function, so no mask is built."""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` new tokens of one sequence: rows [row, row + count) at positions [start, start + count)."""

    slot: int
    start: int
    count: int
    row: int

    @property
    def stop(self) -> int:
        """Length of the sequence once the run is fed."""
        return self.start + self.count


class PackedBatch:
    """The runs of one forward, with the tensors that every layer needs.

    `positions`: int64 [N], the position of each row in its sequence.
    """

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        self.runs = tuple(runs)
        positions = [position for run in runs for position in range(run.start, run.stop)]
        self.positions = torch.tensor(positions, device=device)
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._rows: dict[tuple[int, int], torch.Tensor] = {}

    def rows(self, heads: int, context: int) -> torch.Tensor:
        """int64 [N * heads]: where each new token's heads are in KV of [slots, heads, context], flattened."""
        key = (heads, context)
        if key not in self._rows:
            first = [run.slot * heads * context + at for run in self.runs for at in range(run.start, run.stop)]
            every = torch.tensor(first)[:, None] + torch.arange(heads) * context
            self._rows[key] = every.flatten().to(self.positions.device)
        return self._rows[key]

    def mask(self, run: Run, first: int, window: int | None) -> torch.Tensor:
        """bool [count, stop - first]: which of the keys from position `first` on each row of `run` sees."""
        key = (run.start, run.count, window)
        if key not in self._masks:
            device = self.positions.device
            queries = torch.arange(run.start, run.stop, device=device)[:, None]
            keys = torch.arange(first, run.stop, device=device)
            seen = keys <= queries
            self._masks[key] = seen if window is None else seen & (keys > queries - window)
        return self._masks[key]


ACTIVE: ContextVar[PackedBatch] = ContextVar("packed batch of the running forward")
"""Set around a forward: not every model hands keyword arguments down to its attention."""


def packed_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the active batch, with the signature that transformers' AttentionInterface asks for.

    `query`: [1, heads, N, head dim]. `key`, `value`: [slots, KV heads, context, head dim], the whole KV of the
    layer, which already holds the new tokens. A row at position p sees the positions up to p, with
    `sliding_window` w only those above p - w. `softcap` c bends scores to c tanh(score / c) (Gemma 2). `s_aux`
    [heads]: attention sinks, scores of a key of which every row sees nothing but its weight (gpt-oss).
    Returns [1, N, heads, value dim].
    """
    batch = ACTIVE.get()
    outputs = []
    for run in batch.runs:
        first = 0 if sliding_window is None else max(0, run.start - sliding_window + 1)
        keys = key[run.slot : run.slot + 1, :, first : run.stop]
        values = value[run.slot : run.slot + 1, :, first : run.stop]
        queries = query[:, :, run.row : run.row + run.count]
        mask = None if run.count == 1 else batch.mask(run, first, sliding_window)
        if softcap is None and s_aux is None:
            output = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
            )
        else:
            output = _explicit(queries, keys, values, mask, scaling, softcap, s_aux)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2).contiguous(), None


def _explicit(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """SDPA has no place for a soft cap between the scores and the mask, nor for a sink."""
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = torch.unflatten(queries, 1, (keys.shape[1], -1))  # [1, KV heads, group, count, head dim]
    scores = grouped @ keys.unsqueeze(2).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.view(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ values.unsqueeze(2)).flatten(1, 2)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
