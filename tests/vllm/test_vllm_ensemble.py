"""Experts on vLLM beside experts on transformers, as processes: the text is that of transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import real_expert_dir
from tests.vllm.conftest import needs_vllm
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule

pytestmark = [needs_vllm, pytest.mark.real_experts]

NAMES = ("smollm2", "gemma3")
PROMPT = "The tallest mountain on Earth"
BYTES = 60


@pytest.fixture(scope="module")
def expected() -> str:
    """What both experts on transformers write in this process."""
    experts = {
        name: TransformersExpert(
            name, real_expert_dir(name), dtype="float32", threads=1, max_sequences=4, max_context=128
        )
        for name in NAMES
    }
    request = DecodeRequest(sampling=Sampling(0), max_bytes=BYTES)
    text, _ = LocalEnsemble(experts).generate(PROMPT, Mixture(dict.fromkeys(NAMES, 0.5), Rule.LOG_LINEAR), request)
    for expert in experts.values():
        expert.close()
    return text


@pytest.mark.parametrize("on_vllm", NAMES)
def test_a_mixed_ensemble_writes_the_same_text(tmp_path: Path, expected: str, on_vllm: str) -> None:
    experts: dict[str, dict[str, object]] = {
        name: {"model": str(real_expert_dir(name)), "dtype": "float32", "threads": 1, "max_sequences": 4}
        | {"max_context": 128}
        for name in NAMES
    }
    experts[on_vllm] |= {"backend": "vllm", "engine": {"block_size": 32}}
    config = tmp_path / "swarm.yaml"
    config.write_text(json.dumps({"experts": experts, "cache": str(tmp_path)}))
    command = [sys.executable, "-m", "token_swarm_server.cli", "generate", "--config", str(config), "--prompt", PROMPT]
    run = subprocess.run(
        [*command, "--max-bytes", str(BYTES), "--temperature", "0", "--weights", "smollm2=0.5,gemma3=0.5", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["text"] == expected
