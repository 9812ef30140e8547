"""Turn a demo expert's GGUF file into an ordinary Hugging Face model directory.

Needs numpy, gguf and tokenizers, and neither torch nor transformers, so that it can run while those are installed. It
runs in a process of its own, started by `demo_experts`, which reads the fractions that it prints.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quantize
from tokenizers import Tokenizer

from token_swarm_server.assets.demo_tokenizer import tokenizer_config_of, tokenizer_of
from token_swarm_server.assets.gguf_file import GgufFile

PROBE = "Hello, world!  Room 1234\n\tdef f(x): return x**2  # naïve façade 北京 🙂\r\n"
CHUNK = 1 << 22
"""Values that are converted at a time, between two reports of progress."""

_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Where Gemma 3 has a norm on both sides of its MLP, the others have only the one before it.
_NORMS = {
    "gemma3": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
}
_NORMS_OF_OTHERS = {"ffn_norm": "post_attention_layernorm"}
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""Model type and class in transformers by the architecture's name in GGUF."""


def convert(
    gguf: Path, target: Path, *, probe_sha256: str, ends: Sequence[str] = (), report: Callable[[float], None]
) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer of `gguf` into the directory `target`.

    `probe_sha256`: of the tokens of `PROBE`. `ends`: tokens that end a text beside the one GGUF names. `report` is
    called with the fraction that is done. Files are synced to disk on return. Raises RuntimeError where the tokenizer
    has other tokens, ValueError for an architecture or a tokenizer that is not known here.
    """
    file = GgufFile(gguf)
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / "config.json", config_of(file))
    _write_json(target / "generation_config.json", _generation_config(file.metadata, ends))
    (target / "tokenizer.json").write_text(
        json.dumps(tokenizer_of(file.metadata), ensure_ascii=False), encoding="utf-8"
    )
    _write_json(target / "tokenizer_config.json", tokenizer_config_of(file.metadata))
    if (template := file.metadata.get("tokenizer.chat_template")) is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    if tokens_sha256(target) != probe_sha256:
        raise RuntimeError("the tokenizer as converted splits a text into other tokens than it should")
    write_weights(file, target / "model.safetensors", report)
    for path in target.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())


def tokens_sha256(directory: Path) -> str:
    """Digest of the tokens of `PROBE`, the special ones included."""
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(PROBE).ids
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def config_of(file: GgufFile) -> dict[str, Any]:
    """`config.json` of a GGUF file. Raises ValueError for an architecture that is not known here."""
    metadata = file.metadata
    architecture = metadata["general.architecture"]
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"general.architecture: {architecture!r}; known: {', '.join(_ARCHITECTURES)}")
    model_type, model_class = _ARCHITECTURES[architecture]

    def of(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    heads, hidden = of("attention.head_count"), of("embedding_length")
    config = {
        "architectures": [model_class],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": of("attention.key_length", hidden // heads),
        "max_position_embeddings": of("context_length"),
        # GGUF holds float32; the models were published with the round number.
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        **_special_tokens(metadata),
    }
    theta = of("rope.freq_base")
    if architecture == "gemma3":
        local = {"rope_theta": 10_000.0, "rope_type": "default"}
        layers = [("full" if (index + 1) % 6 == 0 else "sliding") + "_attention" for index in range(of("block_count"))]
        return config | {
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": layers,
            "query_pre_attn_scalar": of("attention.key_length"),
            "rope_parameters": {
                "full_attention": {"rope_theta": theta, "rope_type": "default"},
                "sliding_attention": local,
            },
            "sliding_window": of("attention.sliding_window"),
        }
    # transformers 4, which vLLM environments still use, looks for the plain key and not in rope_parameters.
    return config | {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: metadata[f"tokenizer.ggml.{role}_token_id"] for key, role in roles.items()}


def _generation_config(metadata: Mapping[str, Any], ends: Sequence[str]) -> dict[str, Any]:
    tokens = _special_tokens(metadata)
    more = [metadata["tokenizer.ggml.tokens"].index(token) for token in ends]
    return tokens | ({"eos_token_id": [tokens["eos_token_id"], *more]} if more else {})


def write_weights(file: GgufFile, path: Path, report: Callable[[float], None]) -> None:
    """Write the tensors of a GGUF file as bfloat16 to the safetensors file `path`, a piece at a time."""
    names = _tensor_names(file)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, source in names.items():
        shape = file.tensors[source].shape
        start, end = end, end + 2 * file.tensors[source].size
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        written = 0
        for source in names.values():
            for values in _values(file, source):
                out.write(quantize(values, GGMLQuantizationType.BF16).tobytes())
                written += 2 * values.size
                report(written / end)


def _tensor_names(file: GgufFile) -> dict[str, str]:
    """GGUF's names by transformers', in the order of the latter.

    All demo experts were published with one matrix for embedding and output. Where the file holds two roundings of
    it, the output's is the finer one.
    """
    names = {}
    for source in file.tensors:
        if source == "token_embd.weight" and "output.weight" in file.tensors:
            continue
        names[_tensor_name(source, file.metadata["general.architecture"])] = source
    return dict(sorted(names.items()))


def _tensor_name(source: str, architecture: str) -> str:
    if source in ("token_embd.weight", "output.weight"):
        return "model.embed_tokens.weight"
    if source == "output_norm.weight":
        return "model.norm.weight"
    parts = _PARTS | _NORMS.get(architecture, _NORMS_OF_OTHERS)
    matched = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", source)
    if matched is None or matched[2] not in parts:
        raise ValueError(f"the tensor {source} is not known")
    return f"model.layers.{matched[1]}.{parts[matched[2]]}.{matched[3]}"


def _values(file: GgufFile, name: str) -> Iterator[npt.NDArray[np.float32]]:
    """The values of a tensor as transformers has them, in pieces of its rows."""
    architecture = file.metadata["general.architecture"]
    heads = file.metadata[f"{architecture}.attention.head_count"]
    heads_of = {"attn_q": heads, "attn_k": file.metadata.get(f"{architecture}.attention.head_count_kv", heads)}
    part = name.split(".")[-2]
    permuted = architecture == "llama" and part in heads_of
    for values in file.read(name, None if permuted else CHUNK):
        if permuted:
            # GGUF holds the two halves of each rotary pair side by side.
            pairs = values.reshape(heads_of[part], -1, 2, *values.shape[1:])
            yield np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        elif architecture == "gemma3" and part.endswith("norm"):
            # GGUF holds the factor; Gemma multiplies by one more than its weight.
            yield values - np.float32(1)
        else:
            yield values


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main(gguf: str, target: str, probe_sha256: str, *ends: str) -> None:
    """Convert; the fraction done goes to standard output, a line each."""

    def report(done: float) -> None:
        print(f"{done:.4f}", flush=True)

    convert(Path(gguf), Path(target), probe_sha256=probe_sha256, ends=ends, report=report)


if __name__ == "__main__":
    main(*sys.argv[1:])
