"""Experts on a GPU: they keep the contract, and an ensemble of them writes what it writes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import save_small_llama
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts import laws
from token_swarm.experts.contract import Expert
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.mixing.groups import Unit, make_groups
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: experts ran on the CPU only")

LAWS = (
    laws.step_equals_one_by_one,
    laws.batched_equals_alone,
    laws.chunked_prefill_equals_whole,
    laws.truncate_then_extend_equals_fresh,
    laws.fork_is_independent,
    laws.close_frees_the_sequence,
)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_an_expert_keeps_its_contract(tiny_model_dir: Callable[[str], Path], name: str) -> None:
    expert = TransformersExpert(name, tiny_model_dir(name), device="cuda", max_sequences=6, max_context=80)
    for law in LAWS:
        law(expert, np.random.default_rng(0), 1e-4)


@pytest.mark.parametrize("rule", Rule)
def test_an_ensemble_writes_the_same_text_on_both(tmp_path: Path, rule: Rule) -> None:
    """Two tokenizers, so that bytes are mixed, greedy and sampled."""
    models = {"small": save_small_llama(tmp_path / "small", 262), "large": save_small_llama(tmp_path / "large", 290)}

    def written(device: str, request: DecodeRequest) -> str:
        experts: dict[str, Expert] = {
            name: TransformersExpert(name, path, device=device, dtype="float32") for name, path in models.items()
        }
        ensemble = LocalEnsemble(experts)
        return ensemble.generate("the cat", Mixture(dict.fromkeys(models, 0.5), rule), request)[0]

    for sampling in (Sampling(temperature=0.0), Sampling(top_k=40)):
        request = DecodeRequest(sampling=sampling, seed=7, max_bytes=60, unit=Unit.BYTE)
        assert written("cuda", request) == written("cpu", request)


@pytest.mark.parametrize("rule", Rule)
def test_logits_that_stay_on_the_gpu_are_mixed_there(tiny_model_dir: Callable[[str], Path], rule: Rule) -> None:
    spec = TransformersExpert("one", tiny_model_dir("llama"), max_sequences=6, max_context=80).spec
    other = TransformersExpert("two", tiny_model_dir("llama"), max_sequences=6, max_context=80).spec
    (group,) = make_groups({"one": spec, "two": other}, Mixture({"one": 0.7, "two": 0.3}, rule))
    rows = [torch.randn(spec.vocabulary.width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    law = group.token_law([row.cuda() for row in rows])
    torch.testing.assert_close(law, group.token_law(rows), rtol=2e-5, atol=1e-12)
