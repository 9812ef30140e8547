"""KV that is too small for every sequence: nobody is lost, nothing stalls, nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import real_expert_dir
from tests.vllm.conftest import needs_vllm, vllm_expert
from tests.vllm.histories import Reference, random_steps, run_and_compare
from token_swarm.experts.contract import Close, Extend, Open, Rows
from token_swarm.experts.laws import random_tokens

pytestmark = [needs_vllm, pytest.mark.real_experts]

BLOCK = 32
# Keys and values of SmolLM2 in float32: 30 layers of 3 heads of 64.
BLOCK_BYTES = 2 * 30 * 3 * 64 * 4 * BLOCK
OPERATIONS = 500


def test_sixteen_sequences_in_the_kv_of_five() -> None:
    directory = real_expert_dir("smollm2")
    options = {"block_size": BLOCK, "kv_cache_memory": 31 * BLOCK_BYTES}
    with vllm_expert(directory, max_sequences=16, max_context=160, engine=options) as expert:
        engine = expert._engine
        assert engine.total_blocks == engine.free_blocks == 30
        steps = random_steps(expert, np.random.default_rng(7), operations=OPERATIONS, sequences=16, longest=150)
        worst = run_and_compare(expert, Reference(directory, expert.numbering), steps)
        stats = expert.stats()
        print(f"{OPERATIONS} operations: largest difference {worst:.2e}, {dict(stats.engine)}")
        assert worst < 1e-3
        assert stats.engine["evictions"] > 20
        assert stats.engine["preemptions"] == 0
        assert (stats.sequences, stats.tokens, stats.engine["kv_cache_usage"]) == (0, 0, 0)
        assert engine.free_blocks == 30
        assert not engine._core.scheduler.requests

        # All at once, each far larger than its share: they take turns within one step.
        rng = np.random.default_rng(8)
        texts = [random_tokens(expert, rng, 150) for _ in range(16)]
        more = [random_tokens(expert, rng, 3) for _ in range(16)]
        expert.step([Open(sequence, text, Rows.NONE) for sequence, text in enumerate(texts)])
        together = expert.step([Extend(sequence, new) for sequence, new in enumerate(more)])
        assert expert.stats().engine["waiting"] > 0
        expert.step([Close(sequence) for sequence in range(16)])
        for sequence in (0, 7, 15):
            alone = expert.step([Open(0, texts[sequence] + more[sequence]), Close(0)])
            assert float((together.rows(sequence) - alone.rows(0)).abs().max()) < 1e-3
        assert engine.free_blocks == 30
