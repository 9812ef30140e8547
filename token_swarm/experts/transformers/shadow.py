"""A small copy of a model, in which every threshold of its architecture is passed within 40 tokens.

Whether packed steps compute what the model does is a question of its code, not of its weights: windows, attention
chunks, the original context of scaled rotary embeddings. A copy of the same class with 64 hidden units and random
weights answers it in float32, where no rounding hides a difference, in under a second for a model of any size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

VOCABULARY = 128
"""Tokens that a shadow knows."""

THRESHOLDS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "original_max_position_embeddings",
    "initial_context_length",
    "floor_scale",
    "index_topk",
)
"""Names under which configurations say from which position on a model computes in another way."""

_HEADS, _HEAD_SIZE = 4, 16
_HIDDEN = _HEADS * _HEAD_SIZE
_HEAD_COUNTS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
_WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim"), _HIDDEN),
    **dict.fromkeys(_HEAD_COUNTS, _HEADS),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_head_dim", "swa_head_dim"), _HEAD_SIZE),
    **dict.fromkeys(("global_head_dim", "index_head_dim", "query_pre_attn_scalar", "attention_head_dim"), _HEAD_SIZE),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), _HEAD_SIZE // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), _HIDDEN // 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "inner_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "hidden_size_per_layer_input", "laurel_rank"), 32),
    "index_n_heads": 2,
}
"""What widths become, by the names under which configurations know them; those that are absent, None or 0 stay so."""
_NUMBERS = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_expert_group"), 1),
}
"""What becomes of the number of things, in the same way."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
_FACTORS = ("short_factor", "long_factor")
_MOST_PARAMETERS = 10**8
_LARGE = 1.5
"""Standard deviation of a weight times the root of its inputs: in a model of small weights attention and positions
hardly matter, and mistakes in them could not be seen."""


class ShadowError(RuntimeError):
    """No small copy of a model can be made."""


def thresholds(config: Any) -> dict[str, int]:
    """The thresholds that a configuration sets, by a name that is unique in it, in positions."""
    return {name: int(holder[key]) for name, key, holder in _set_thresholds(config.get_text_config())}


def shadow_model(model: Any, limits: Mapping[str, int]) -> nn.Module:
    """A model of the class of `model` with random float32 weights that bfloat16 keeps, on the CPU.

    `limits`: what each of `thresholds` is set to. Raises ShadowError where the class cannot be made small.
    """
    try:
        return _drawn(model, _small_config(model.config, limits, narrow=True))
    except ShadowError:
        # Sizes that depend on each other in a way of their own: those of the model, of which few layers are kept.
        return _drawn(model, _small_config(model.config, limits, narrow=False))


def _drawn(model: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in _make(model, config).parameters())
            if size > _MOST_PARAMETERS:
                raise ShadowError(f"a copy of few layers has {size} parameters")
            shadow = _make(model, config).float().eval()
            _draw_weights(shadow)
            with torch.inference_mode():
                shadow(input_ids=torch.arange(8)[None], use_cache=False)
        except ShadowError:
            raise
        except Exception as error:  # whatever the code of 189 architectures raises for sizes that it did not expect
            raise ShadowError(f"{type(error).__name__}: {error}") from error
    return shadow


def _make(model: Any, config: Any) -> nn.Module:
    """A model of text and images is asked for its text model."""
    made: nn.Module = (
        type(model)(config)
        if model.config.get_text_config() is model.config
        else AutoModelForCausalLM.from_config(config)
    )
    return made


def _draw_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                # Gains and biases stay near what the class begins with, and differ from one unit to the next.
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, _LARGE / math.sqrt(parameter.shape[-1]))
            parameter.copy_(parameter.bfloat16())
    tie: Any = model.tie_weights
    tie()


def _small_config(original: Any, limits: Mapping[str, int], *, narrow: bool) -> Any:
    config = copy.deepcopy(original.get_text_config())
    # What a checkpoint is stored in is no part of the model's code.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    for name, key, holder in list(_set_thresholds(config)):
        if name in limits:
            holder[key] = limits[name]
    _keep_layers(config)
    for name in [name for name in config.__dict__ if name.endswith(("_token_id", "_token_index"))]:
        if config.__dict__[name] is not None:
            config.__dict__[name] = 0 if name == "pad_token_id" else 1
    for name in _NUMBERS:
        if config.__dict__.get(name):
            config.__dict__[name] = _NUMBERS[name]
    if narrow:
        _narrow(config)
    return config


def _narrow(config: Any) -> None:
    """Shrink what says how wide the model is."""
    own = config.__dict__
    heads = next((own[name] for name in _HEAD_COUNTS if own.get(name)), 1)
    for name in _KV_HEADS:
        if own.get(name):
            own[name] = 1 if own[name] == 1 else _HEADS // 2 if own[name] < heads else _HEADS
    for name, size in _WIDTHS.items():
        if own.get(name) and not isinstance(own[name], list):
            own[name] = size
    if own.get("qk_rope_head_dim") and own.get("head_dim"):
        own["head_dim"] = own["qk_rope_head_dim"]  # multi-head latent attention rotates a part of its own
    for rope in _rope_settings(config):
        rotated = max(2, int(_HEAD_SIZE * float(rope.get("partial_rotary_factor", 1.0) or 1.0)))
        for name in _FACTORS:
            if isinstance(rope.get(name), list):
                rope[name] = rope[name][: rotated // 2]
        if rope.get("mrope_section"):
            third = rotated // 2 // 3
            rope["mrope_section"] = [rotated // 2 - 2 * third, third, third]


def _keep_layers(config: Any) -> None:
    """Keep one layer of each kind, at least two: what a list says of every layer is cut to those that stay."""
    own = config.__dict__
    name = next((name for name in _LAYERS if own.get(name)), None)
    if name is None:
        return
    count = int(own[name])
    lists = {key: list(value) for key, value in own.items() if isinstance(value, list | tuple) and len(value) == count}
    kinds = list(zip(*lists.values(), strict=True)) if lists and count > 1 else [()] * count
    kept: list[int] = []
    for index, kind in enumerate(kinds):
        if all(repr(kinds[other]) != repr(kind) for other in kept):
            kept.append(index)
    kept = sorted({*kept[:6], *range(min(2, count))})[:6]
    for key, value in lists.items():
        own[key] = [value[index] for index in kept]
    for key in _LAYERS:
        if own.get(key):
            own[key] = len(kept)
    if isinstance(own.get("max_window_layers"), int):
        own["max_window_layers"] = min(own["max_window_layers"], 1)


def _set_thresholds(config: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(unique name, key, the dictionary that holds the key) of every threshold that `config` sets."""
    places = [("", config.__dict__), *((f"rope{number}.", rope) for number, rope in enumerate(_rope_settings(config)))]
    for prefix, holder in places:
        for key in THRESHOLDS:
            value = holder.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                yield prefix + key, key, holder


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The dictionaries that say how positions are rotated: one, or one for each kind of layer."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        value = config.__dict__.get(name)
        if isinstance(value, dict):
            nested = [each for each in value.values() if isinstance(each, dict)]
            found += nested or [value]
    return [each for number, each in enumerate(found) if all(each is not other for other in found[:number])]
