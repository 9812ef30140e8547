"""Loading a Hugging Face causal LM, or saying in one sentence why it cannot take part."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from token_swarm.experts.loading import ExpertLoadError, dtype_of, one_line, source_of, tokenizer_of


def load(model: str | Path, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a directory or hub id, in evaluation mode on `device`.

    Raises ExpertLoadError when it is missing, is not a causal LM, keeps a state that cannot be rolled back,
    or has an attention that cannot be replaced.
    """
    source = source_of(model)
    with one_line(source):
        config = AutoConfig.from_pretrained(source)
        network, found = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype_of(dtype, device), output_loading_info=True
        )
    tokenizer = tokenizer_of(source)
    name = type(network).__name__
    if missing := sorted(found["missing_keys"]):
        # transformers would serve random numbers in their place.
        raise ExpertLoadError(f"model: {source} lacks {len(missing)} weights of {name}, such as {missing[0]}")
    if getattr(network, "_is_stateful", False):
        raise ExpertLoadError(f"model: {name} keeps a recurrent state, which cannot be rolled back")
    if not getattr(network, "_supports_attention_backend", False):
        raise ExpertLoadError(f"model: the attention of {name} cannot be replaced (no AttentionInterface)")
    if getattr(config, "is_encoder_decoder", False):
        raise ExpertLoadError(f"model: {name} is an encoder-decoder, a decoder-only model is needed")
    return network.eval().to(device), tokenizer


def cache_argument(network: Any) -> str:
    """What `network` calls its cache, in a forward and in its output: `cache` from transformers 5.24 on, which takes
    `past_key_values`, as it was called before, until 5.40."""
    kind: Any = type(network)
    return _cache_argument(kind)


@functools.cache
def _cache_argument(kind: Any) -> str:
    # Every step asks, and reading a signature takes as long as a small kernel.
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
