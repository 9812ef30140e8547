"""GGUF files are read, and converted, as gguf and transformers themselves do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from token_swarm_server.assets import demo_conversion
from token_swarm_server.assets.demo_conversion import config_of, write_weights
from token_swarm_server.assets.demo_tokenizer import tokenizer_config_of, tokenizer_of
from token_swarm_server.assets.gguf_file import GgufFile
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
BYTES = [chr(c) for c in range(ord("!"), ord("~") + 1)]
TOKENS = [*BYTES, "Ġ", "Ċ", "th", "the", "Ġthe", "<|end|>", "<tool>", "[PAD101]", "[PAD102]"]
TYPES = [1] * (len(TOKENS) - 4) + [3, 4, 5, 5]
KINDS = {"q": Kind.Q8_0, "k": Kind.Q5_0, "v": Kind.Q4_1, "output": Kind.F16}
"""How the projections of the small files are stored; the rest is float32."""


def layer_tensors(architecture: str) -> dict[str, tuple[int, ...]]:
    width = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HEADS * width, HIDDEN),
        "attn_k.weight": (KV_HEADS * width, HIDDEN),
        "attn_v.weight": (KV_HEADS * width, HIDDEN),
        "attn_output.weight": (HIDDEN, HEADS * width),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    if architecture == "qwen2":
        shapes |= {f"attn_{part}.bias": (shapes[f"attn_{part}.weight"][0],) for part in "qkv"}
    if architecture == "gemma3":
        shapes |= {f"attn_{part}_norm.weight": (width,) for part in "qk"}
        shapes |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
    return shapes


def write_gguf(path: Path, architecture: str, *, untied: bool = False) -> Path:
    """A random model of two layers, with projections of several types."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    if architecture == "gemma3":
        writer.add_key_length(HIDDEN // HEADS)
        writer.add_sliding_window(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_eos_token_id(TOKENS.index("<|end|>"))
    writer.add_bos_token_id(TOKENS.index("<|end|>"))
    writer.add_pad_token_id(TOKENS.index("<|end|>"))
    writer.add_add_bos_token(False)

    def add(name: str, shape: tuple[int, ...], kind: Kind) -> None:
        values = rng.standard_normal(shape, np.float32)
        stored = gguf.quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)

    add("token_embd.weight", (len(TOKENS), HIDDEN), Kind.Q8_0)
    if untied:
        add("output.weight", (len(TOKENS), HIDDEN), Kind.F16)
    add("output_norm.weight", (HIDDEN,), Kind.F32)
    for layer in range(LAYERS):
        for name, shape in layer_tensors(architecture).items():
            part = name.removeprefix("attn_").removesuffix(".weight")
            add(f"blk.{layer}.{name}", shape, KINDS.get(part, Kind.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(path: Path) -> dict[str, torch.Tensor]:
    target = path.with_suffix(".safetensors")
    reported: list[float] = []
    write_weights(GgufFile(path), target, reported.append)
    assert reported == sorted(reported)
    assert reported[-1] == 1
    tensors: dict[str, torch.Tensor] = load_file(target)
    return tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_weights_are_bit_for_bit_those_that_transformers_loads(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small pieces, so that there are several of a tensor.
    monkeypatch.setattr(demo_conversion, "CHUNK", 5 * HIDDEN)
    path = write_gguf(tmp_path / "model.gguf", architecture)
    ours = converted(path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16)
    theirs = {name: tensor for name, tensor in loaded.state_dict().items() if name != "lm_head.weight"}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_config_is_the_one_that_transformers_reads(tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture)
    ours = AutoConfig.for_model(**config_of(GgufFile(path)))
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    assert type(ours) is type(theirs)
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["max_position_embeddings", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id"]
    names += ["pad_token_id", "rope_parameters", "layer_types", "sliding_window", "hidden_act", "hidden_activation"]
    for name in names:
        assert getattr(ours, name, None) == getattr(theirs, name, None), name
    # GGUF holds float32.
    assert ours.rms_norm_eps == 1e-6
    assert theirs.rms_norm_eps == pytest.approx(1e-6, rel=1e-6)


def test_of_two_roundings_of_the_embedding_the_finer_one_is_kept(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "qwen2", untied=True)
    (output,) = GgufFile(path).read("output.weight")
    tensors = converted(path)
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], torch.from_numpy(output).bfloat16())


@pytest.mark.parametrize("most", [None, 1, 3 * HIDDEN, 10**9])
def test_values_are_those_that_gguf_reads(tmp_path: Path, most: int | None) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama")
    file = GgufFile(path)
    reader: Any = gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        values = np.concatenate(list(file.read(tensor.name, most)))
        np.testing.assert_array_equal(values, gguf.dequantize(tensor.data, tensor.tensor_type))
    fields = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert file.metadata == fields


def test_tokens_are_those_that_transformers_splits_into(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "qwen2")
    file = GgufFile(path)
    ours = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer_of(file.metadata))))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("the the\n\nthe", "them<|end|>the <tool>x", "12345 it's"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert tokenizer_config_of(file.metadata)["eos_token"] == "<|end|>"


def test_padding_is_no_token(tmp_path: Path) -> None:
    metadata = GgufFile(write_gguf(tmp_path / "model.gguf", "qwen2")).metadata
    vocabulary = tokenizer_of(metadata)["model"]["vocab"]
    assert "[PAD101]" not in vocabulary
    assert len(vocabulary) == len(TOKENS) - 2


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ValueError, match="GGUF version 9; supported: 2 and 3"):
        GgufFile(broken)
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.gguf: not a GGUF file"):
        GgufFile(broken)
    file = GgufFile(write_gguf(tmp_path / "model.gguf", "qwen2"))
    with pytest.raises(ValueError, match=r"general\.architecture: 'mamba'; known: llama, qwen2, gemma3"):
        file.metadata["general.architecture"] = "mamba"
        config_of(file)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre: 'tekken'; known: smollm, qwen2"):
        tokenizer_of(file.metadata | {"tokenizer.ggml.pre": "tekken"})
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model: 'rwkv'; known: gpt2"):
        tokenizer_of(file.metadata | {"tokenizer.ggml.model": "rwkv"})
