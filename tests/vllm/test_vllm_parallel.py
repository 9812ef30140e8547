"""A model split over two worker processes: logits reach us from the first of them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import tiny_tokenizer
from tests.vllm.conftest import needs_vllm, vllm_expert
from tests.vllm.histories import Reference, random_steps, run_and_compare

pytestmark = needs_vllm


def test_tensor_parallel_logits_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Heads of 32: vLLM's attention on a CPU knows no smaller ones.
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = {"tensor_parallel_size": 2, "block_size": 32, "kv_cache_memory": 4_000_000}
    dead = threading.Event()
    with vllm_expert(tmp_path, max_sequences=6, max_context=128, engine=options, on_failure=dead.set) as expert:
        steps = random_steps(expert, np.random.default_rng(9), operations=60, sequences=5, longest=60)
        worst = run_and_compare(expert, Reference(tmp_path, expert.numbering), steps)
        print(f"two workers: largest difference {worst:.2e}")
        assert 0 < worst < 1e-3
        assert expert._engine.free_blocks == expert._engine.total_blocks

        assert not dead.is_set()
        workers = [child for child in psutil.Process().children(recursive=True) if "Worker" in child.name()]
        assert len(workers) == 2
        workers[1].kill()
        assert dead.wait(30), "nobody was told that a worker died"
