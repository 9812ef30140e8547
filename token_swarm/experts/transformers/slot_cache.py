"""The KV of many sequences: one preallocated buffer per layer, a slot of it for each sequence."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from transformers import Cache

from token_swarm import memory
from token_swarm.experts.transformers.packed_attention import ACTIVE

_WARM = 2
"""Free slots that keep their memory: side branches of a text open and close a sequence every few tokens."""


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of up to `slots` sequences of up to `context` tokens each.

    A layer's buffers are [slots, KV heads, context, head dim], allocated at its first update, when the shapes
    are known. Memory that no token was written to is never touched, and on a CPU slots that are free give theirs back,
    but for the few that are taken next. The cache does not know lengths: a
    rollback is a shorter length in the caller's books, and what lies behind it is overwritten later.
    """

    def __init__(self, slots: int, context: int) -> None:
        super().__init__(layers=[])
        self._shape = (slots, context)
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._free = list(range(slots))
        # Free slots whose memory was touched.
        self._warm: set[int] = set()
        self.nbytes_per_token = 0
        """Bytes that a position of one sequence takes in all layers; 0 before the first forward."""

    def take(self) -> int:
        """The lowest free slot. Raises IndexError when there is none."""
        slot = heapq.heappop(self._free)
        self._warm.discard(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        heapq.heappush(self._free, slot)
        self._warm.add(slot)
        while len(self._warm) > _WARM:
            self._cool(max(self._warm))

    @property
    def has_free_slot(self) -> bool:
        """Whether `take` would succeed."""
        return bool(self._free)

    def release_all(self) -> None:
        """Free every slot."""
        self._free = list(range(self._shape[0]))
        for slot in self._free:
            self._cool(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows of the active batch, [1, KV heads, N, head dim], and return the layer's buffers."""
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = (self._allocate(key_states), self._allocate(value_states))
        batch = ACTIVE.get()
        keys, values = self._buffers[layer_idx]
        if len(batch.runs) == 1:
            run = batch.runs[0]
            keys[run.slot, :, run.start : run.stop] = key_states[0]
            values[run.slot, :, run.start : run.stop] = value_states[0]
        else:
            # One index into rows of one length: with an index a dimension the same takes three times as long.
            rows = batch.rows(key_states.shape[1], self._shape[1])
            for buffer, states in ((keys, key_states), (values, value_states)):
                width = states.shape[3]
                buffer.view(-1, width).index_copy_(0, rows, states[0].transpose(0, 1).reshape(-1, width))
        return keys, values

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """0: positions are always given explicitly, a model must not derive them from the cache."""
        return 0

    def _cool(self, slot: int) -> None:
        """Give back the memory of a free slot."""
        self._warm.discard(slot)
        for buffers in self._buffers.values():
            for buffer in buffers:
                if buffer.device.type == "cpu":
                    memory.give_back_pages(buffer[slot])

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        slots, context = self._shape
        # Counted here: whoever asks what the expert holds does so after every step.
        self.nbytes_per_token += states.shape[1] * states.shape[3] * states.element_size()
        return torch.empty(slots, states.shape[1], context, states.shape[3], dtype=states.dtype, device=states.device)
