"""What a vLLM expert refuses at start, in one line; and what the launcher makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, MambaConfig, MambaForCausalLM

from tests.conftest import real_expert_dir, tiny_tokenizer
from tests.vllm.conftest import needs_vllm, vllm_expert
from token_swarm.experts.loading import ExpertLoadError


@needs_vllm
@pytest.mark.real_experts
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 8192}, r"^max_context: 8192 is not allowed, at most 8191: the model knows 8192 positions"),
        ({"max_context": 4}, r"^max_context: 4 is not allowed, at least 24 is needed$"),
        ({"max_sequences": 2}, r"^max_sequences: 2 is not allowed, at least 3 is needed$"),
        ({"dtype": "int4"}, r"^dtype: 'int4' is not one of auto, float32, bfloat16, float16$"),
        ({"device": "cuda:0"}, r"^device: 'cuda:0' is not available: this vLLM runs on cpu$"),
        ({"device": "gpu1"}, r"^device: 'gpu1' is not one, such as cpu or cuda:0$"),
        ({"engine": {"max_model_len": 9}}, r"^engine.max_model_len: unknown; allowed: block_size"),
        ({"engine": {"quantization": "nonsense"}}, r"^model: .* cannot be run by vllm 0.32.*nonsense"),
        ({"engine": {"quantization": "awq"}}, r"^model: .* cannot be run by vllm 0.32.*awq"),
        ({"engine": {"kv_cache_dtype": "no"}}, r"^model: .* cannot be run by vllm 0.32.*cache_dtype: Input should be"),
        (
            {"engine": {"kv_cache_memory": 3_000_000}},
            r"^engine.kv_cache_memory: 3000000 bytes are too little KV for one sequence of max_context 512: ",
        ),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(ExpertLoadError, match=message) as raised,
        vllm_expert(real_expert_dir("smollm2"), **{"max_context": 512, **options}),
    ):
        pass
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@needs_vllm
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", "^model: vllm .* does not generate text with BertModel$"),
        ("mamba", "^model: MambaForCausalLM keeps a recurrent state, which cannot be rolled back$"),
        ("unknown", "^model: .* cannot be loaded as a causal language model: .*`nonsense`"),
    ],
)
def test_models_that_cannot_be_served(tmp_path: Path, kind: str, message: str) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1}
    if kind == "bert":
        BertModel(BertConfig(**sizes, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path)
    elif kind == "mamba":
        MambaForCausalLM(MambaConfig(**sizes, state_size=4)).save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ExpertLoadError, match=message) as raised, vllm_expert(tmp_path, max_context=64):
        pass
    assert "\n" not in str(raised.value)


def start(tmp_path: Path, expert: str) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "swarm.yaml"
    config.write_text(f"experts: {{a: {expert}}}\ncache: {tmp_path}\n")
    command = [sys.executable, "-m", "token_swarm_server.cli", "generate", "--config", str(config), "--prompt", "x"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )


@needs_vllm
@pytest.mark.real_experts
def test_the_launcher_passes_the_reason_on(tmp_path: Path) -> None:
    model = real_expert_dir("smollm2")
    options = "{block_size: 32, kv_cache_memory: 3000000}"
    run = start(tmp_path, f"{{model: {model}, backend: vllm, max_context: 512, threads: 1, engine: {options}}}")
    assert run.returncode == 2, run.stderr
    assert "engine.kv_cache_memory: 3000000 bytes are too little KV" in " ".join(run.stderr.split())


@pytest.mark.skipif(not needs_vllm.args[0], reason="vllm is installed for this interpreter: nothing is missing")
def test_an_interpreter_without_vllm_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(ExpertLoadError, match=r"^backend: vllm is not installed for this interpreter; install it"),
        vllm_expert(tmp_path),
    ):
        pass
