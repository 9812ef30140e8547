"""Loading a Hugging Face causal LM, or saying in one sentence why it cannot take part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from token_swarm.experts.loading import ExpertLoadError, dtype_of, one_line, source_of


def load(model: str | Path, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a directory or hub id, in evaluation mode on `device`.

    Raises ExpertLoadError when it is missing, is not a causal LM, keeps a state that cannot be rolled back,
    or has an attention that cannot be replaced.
    """
    source = source_of(model)
    with one_line(source):
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        network = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype_of(dtype, device))
    name = type(network).__name__
    if getattr(network, "_is_stateful", False):
        raise ExpertLoadError(f"model: {name} keeps a recurrent state, which cannot be rolled back")
    if not getattr(network, "_supports_attention_backend", False):
        raise ExpertLoadError(f"model: the attention of {name} cannot be replaced (no AttentionInterface)")
    if getattr(config, "is_encoder_decoder", False):
        raise ExpertLoadError(f"model: {name} is an encoder-decoder, a decoder-only model is needed")
    return network.eval().to(device), tokenizer
