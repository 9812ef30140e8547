"""A model made ready for packed batches, and one forward over such a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from token_swarm.experts.transformers.cpu_embedding import PackedEmbedding, pack_embedding
from token_swarm.experts.transformers.cpu_linear import CpuLinear, PackedLinear, pack_linears
from token_swarm.experts.transformers.cpu_norm import pack_norms
from token_swarm.experts.transformers.loading import cache_argument
from token_swarm.experts.transformers.packed_attention import ACTIVE, IMPLEMENTATION, PackedBatch, Run
from token_swarm.experts.transformers.slot_cache import SlotCache


def pack(model: Any, columns: torch.Tensor | None = None) -> bool:
    """Replace the attention of `model`, and on a CPU its linear layers and norms.

    `columns`: int64 [width], the order in which the last layer is to have its outputs. Returns whether it has; what is
    not packed keeps the order of the model.
    """
    model.set_attn_implementation(IMPLEMENTATION)
    head = model.get_output_embeddings()
    if model.device.type == "cpu":
        tied = head.weight is model.get_input_embeddings().weight
        pack_linears(model, torch.get_num_threads(), head, columns)
        pack_embedding(model, tied)
        pack_norms(model)
    return columns is not None and model.get_output_embeddings() is not head


def weight_bytes(model: Any) -> int:
    """Bytes that the weights of a packed model take, whatever they are packed into."""
    tensors = {each.data_ptr(): each.nbytes for each in itertools.chain(model.parameters(), model.buffers())}
    packed = [each for each in model.modules() if isinstance(each, PackedLinear | PackedEmbedding)]
    # What torch's own products pack is hidden in it, 2 bytes a weight.
    hidden = sum(2 * each.weight.numel() for each in model.modules() if isinstance(each, CpuLinear))
    return int(sum(tensors.values()) + sum(each.nbytes for each in packed) + hidden)


def packed_forward(
    model: Any, cache: SlotCache, runs: Sequence[Run], tokens: Sequence[int], wanted: Sequence[int]
) -> torch.Tensor:
    """Feed `tokens`, which `runs` share out among the slots of `cache`.

    Returns the logits of the tokens at `wanted`: [rows, width].
    """
    device = model.device
    batch = PackedBatch(runs, device)
    active = ACTIVE.set(batch)
    try:
        output = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=batch.positions[None],
            use_cache=True,
            **{cache_argument(model): cache},
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
        )
    finally:
        ACTIVE.reset(active)
    logits: torch.Tensor = output.logits[0]
    return logits
