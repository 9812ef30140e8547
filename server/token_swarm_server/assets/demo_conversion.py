"""Turn a demo expert's GGUF file into an ordinary Hugging Face model directory.

Slow (minutes on one core) and memory-hungry, therefore run in a process of its own by `demo_experts`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PROBE = "Hello, world!  Room 1234\n\tdef f(x): return x**2  # naïve façade 北京 🙂\r\n"


def convert(gguf: Path, target: Path, *, digit_pre_tokenizer: bool, probe_sha256: str) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer of `gguf` into the directory `target`.

    With `digit_pre_tokenizer`, digits are split one by one before the byte-level split: a GGUF file only names
    that step, and transformers does not put it back. Files are synced to disk on return.

    `probe_sha256`: of the tokens of `PROBE`. Raises RuntimeError where the tokenizer has others: some versions of
    transformers read the tokenizer of Gemma from GGUF without its text normaliser and its token of beginning.
    """
    target.mkdir(parents=True, exist_ok=True)
    _convert_tokenizer(gguf, target, digit_pre_tokenizer=digit_pre_tokenizer)
    if tokens_sha256(target) != probe_sha256:
        raise RuntimeError(
            f"transformers {transformers.__version__} reads the tokenizer of the GGUF file differently; install the "
            "version that constraints.txt names"
        )
    _convert_weights(gguf, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def tokens_sha256(directory: Path) -> str:
    """Digest of the tokens of `PROBE`, the special ones included."""
    tokens = AutoTokenizer.from_pretrained(directory)(PROBE).input_ids
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _convert_weights(gguf: Path, target: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    config = _clean_config(loaded.config)
    # A model read from GGUF counts as quantised and refuses to be saved, so its weights move into a fresh one.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)


def _clean_config(loaded: Any) -> Any:
    config = copy.deepcopy(loaded)
    del config.quantization_config
    # GGUF holds float32; the models were published with the round number.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    # transformers 4, which vLLM environments still use, looks for the plain key and not in rope_parameters.
    if "rope_theta" in config.rope_parameters:
        config.rope_theta = config.rope_parameters["rope_theta"]
    return config


def _convert_tokenizer(gguf: Path, target: Path, *, digit_pre_tokenizer: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if digit_pre_tokenizer:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(target)
    config_path = target / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        # The name both transformers 4 and 5 know for "whatever tokenizer.json says".
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
