"""The vLLM backend on the demo experts: the contract's laws, the logits, and the texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.conftest import real_expert_dir
from tests.vllm.conftest import needs_vllm, vllm_expert
from tests.vllm.histories import Reference, random_steps, run_and_compare
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts import laws
from token_swarm.experts.contract import Extend, Open, Rows
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule

if TYPE_CHECKING:
    from token_swarm.experts.vllm.expert import VllmExpert

pytestmark = [needs_vllm, pytest.mark.real_experts]

PROMPTS = ["The tallest mountain on Earth", "def fibonacci(n):", "Once upon a time, there was"]
TOKENS = 40


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expert(name: str) -> Iterator[VllmExpert]:
    # The window of Gemma 3, 512, and a block fit: the check at start goes beyond the window.
    with vllm_expert(real_expert_dir(name), max_sequences=9, max_context=600, engine={"block_size": 32}) as expert:
        yield expert


@pytest.mark.parametrize("law", [law for law in laws.LAWS if law is not laws.random_operations_equal_fresh])
def test_the_contract(expert: VllmExpert, law: laws.Law) -> None:
    law(expert, np.random.default_rng(3), 1e-3)
    assert expert.stats().sequences == 0
    assert expert.stats().engine["kv_cache_usage"] == 0


def test_tokens_write_their_text(expert: VllmExpert) -> None:
    laws.tokenize_writes_the_text(expert, ["Hello world", " 12 naïve 🙂\n", ""])


def test_logits_are_those_of_transformers(expert: VllmExpert, name: str) -> None:
    steps = random_steps(expert, np.random.default_rng(5), operations=200, sequences=8, longest=60)
    worst = run_and_compare(expert, Reference(real_expert_dir(name), expert.numbering), steps)
    print(f"{name}: largest difference {worst:.2e}")
    assert 0 < worst < 1e-3


def test_a_rollback_behind_the_sliding_window(expert: VllmExpert, name: str) -> None:
    rng = np.random.default_rng(6)
    tokens, new = laws.random_tokens(expert, rng, 590), laws.random_tokens(expert, rng, 4)
    expert.step([Open(1, tokens, Rows.NONE)])
    rows = expert.step([laws.Truncate(1, 530), Extend(1, new, Rows.ALL)]).rows(1)
    expert.step([laws.Close(1)])
    (expected,) = Reference(real_expert_dir(name), expert.numbering).rows([tokens[:530] + new], [4])
    assert float((rows - expected).abs().max()) < 1e-3


def test_a_failed_forward_closes_every_sequence(expert: VllmExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    expert.step([Open(1, (5, 6, 7)), Open(2, (5, 6, 7, 8))])
    with monkeypatch.context() as patch:
        patch.setattr(expert._engine._core, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            expert.step([Extend(1, (9,)), laws.Close(1), Open(3, (5, 6))])
    assert expert.stats().sequences == 0
    assert expert._engine.free_blocks == expert._engine.total_blocks
    laws.fork_is_independent(expert, np.random.default_rng(4), 1e-3)


def test_what_the_expert_says_of_itself(expert: VllmExpert) -> None:
    expert.step([Open(1, (5, 6, 7)), Open(2, (5, 6, 7, 8))])
    stats = expert.stats()
    assert (stats.sequences, stats.tokens) == (2, 7)
    assert stats.capacity >= 9 * 600
    assert stats.engine["running"] == 2
    assert 0 < stats.engine["kv_cache_usage"] < 1
    assert stats.engine["preemptions"] == stats.engine["evictions"] == stats.engine["waiting"] == 0
    expert.step([laws.Close(1), laws.Close(2)])
    assert expert.stats().engine["kv_cache_usage"] == 0


def test_one_hot_text_is_vllms_own(name: str) -> None:
    """Greedy, token by token through the contract, against `LLM.generate`."""
    directory = real_expert_dir(name)
    with vllm_expert(directory, max_sequences=4, max_context=256, engine={"block_size": 32}) as expert:
        ensemble = LocalEnsemble({"expert": expert})
        decode = DecodeRequest(sampling=Sampling(0), max_tokens=TOKENS, max_bytes=10_000)
        texts = [ensemble.generate(prompt, Mixture({"expert": 1.0}, Rule.LINEAR), decode)[0] for prompt in PROMPTS]
        numbering, vocabulary = expert.numbering, expert.spec.vocabulary
        prompts = [numbering.to_model(expert.encode(prompt).tokens) for prompt in PROMPTS]
        eos = numbering.to_model(vocabulary.eos_ids)

    from vllm import LLM, SamplingParams

    llm = LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=100_000_000,
        disable_log_stats=True,
    )
    params = SamplingParams(temperature=0, max_tokens=TOKENS, stop_token_ids=list(eos))
    outputs = llm.generate([{"prompt_token_ids": list(tokens)} for tokens in prompts], params, use_tqdm=False)
    own = [
        vocabulary.text(
            numbering.from_model(token for token in output.outputs[0].token_ids if token not in eos)
        ).decode(errors="ignore")
        for output in outputs
    ]
    llm.llm_engine.engine_core.shutdown()
    assert texts == own
