"""Laws 2, 3 and 8 on the two real experts, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.test_transformers_expert import plain_model
from token_swarm.decoding.in_process import LocalEnsemble
from token_swarm.decoding.request import DecodeRequest, FinishReason
from token_swarm.experts.contract import Close, Open
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.mixing.byte_unit import ByteUnit
from token_swarm.mixing.groups import Unit
from token_swarm.mixing.sampling import Sampling
from token_swarm.particle import Mixture, Rule

pytestmark = pytest.mark.real_experts

NAMES = ("smollm2", "gemma3")
UNIFORM = Mixture(dict.fromkeys(NAMES, 0.5), Rule.LOG_LINEAR)
DATA = Path(__file__).parents[1] / "data"
TEXT = (DATA / "prose.txt").read_text(encoding="utf-8")
CODE = (DATA / "module.py.txt").read_text(encoding="utf-8")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def local(real_expert: Callable[[str], TransformersExpert]) -> LocalEnsemble:
    return LocalEnsemble({name: real_expert(name) for name in NAMES})


@pytest.mark.parametrize("text", [TEXT[:500], "naïve 🙂 — 東京, 2 + 2 = 4\n\n\tdef f(x):\r\n  return x\n"])
@pytest.mark.parametrize("prompt", ["", "In the beginning of the sto"])
def test_bytes_telescope_to_tokens(local: LocalEnsemble, prompt: str, text: str) -> None:
    """Law 2: never below the token figure, and above it only by other tokenizations."""
    score = local.score(prompt, text, UNIFORM)
    assert np.isfinite(score.per_byte).all()
    for own in score.experts.values():
        assert len(own.per_byte) == len(text.encode())
        if not prompt:  # after a prompt, the token that is taken back adds its own bytes to the token figure
            assert own.log_prob >= own.token_log_prob * (1 + 1e-3)
            assert own.log_prob <= own.token_log_prob * 0.97
        assert own.log_prob >= own.token_log_prob - 1e-3


def test_the_ensemble_is_better_than_its_experts(local: LocalEnsemble) -> None:
    score = local.score("", CODE[:600], UNIFORM)
    assert score.bits_per_byte() < min(score.bits_per_byte(name) for name in NAMES)


@pytest.mark.parametrize("unit", [Unit.AUTO, Unit.BYTE])
@pytest.mark.parametrize("name", NAMES)
def test_one_hot_is_generate(
    local: LocalEnsemble, real_expert: Callable[[str], TransformersExpert], name: str, unit: Unit
) -> None:
    """Law 3 on real models: byte-identical to transformers' own greedy generate."""
    prompt, limit = "The history of the printing press begins in", 60
    mixture = Mixture({other: float(other == name) for other in NAMES})
    text, finish = local.generate(prompt, mixture, DecodeRequest(sampling=GREEDY, unit=unit, max_tokens=limit))
    spec, numbering = local.ensemble.specs[name], real_expert(name).numbering
    tokens = torch.tensor([numbering.to_model(local.encode(mixture, prompt)[name].tokens)])
    expected = plain_model(name).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=limit
    )[0, tokens.shape[1] :]
    assert text.encode() == spec.vocabulary.text(numbering.from_model(expected.tolist()))
    assert finish.experts[name].tokens in (limit, len(expected) - 1)
    assert finish.experts[name].wasted == 0


def laws(local: LocalEnsemble, text: bytes, request: DecodeRequest) -> list[tuple[list[np.ndarray], float, float]]:
    """Per position: each group's law, the certificate and the retired share."""
    unit = local.ensemble.unit(UNIFORM, request, local.encode(UNIFORM, TEXT[:64]))
    assert isinstance(unit, ByteUnit)
    found = []
    for byte in text:
        while needs := unit.due():
            for need in needs:
                (name,) = unit.groups[need.group].names
                sequence = local.allocate(name)
                (rows, _) = local.run({name: [Open(sequence, need.tokens), Close(sequence)]})[name]
                assert isinstance(rows, torch.Tensor)
                unit.feed(need, [rows[0]])
        found.append((unit.laws, unit.certificate, unit.retired))
        unit.advance(byte)
    return found


def test_total_variation_is_within_the_certificate(local: LocalEnsemble) -> None:
    """Law 8: rigorous without a window; with one, the default, the distance stays below epsilon on average."""
    text = TEXT[64:].encode()
    rough = laws(local, text[:14], DecodeRequest(epsilon=0.3, window=None))
    tight = laws(local, text[:14], DecodeRequest(epsilon=0.02, window=None))
    for (coarse, certificate, _), (fine, own, _) in zip(rough, tight, strict=True):
        for left, right in zip(coarse, fine, strict=True):
            assert np.abs(left - right).sum() / 2 <= certificate + own + 1e-9
    default = laws(local, text[:90], DecodeRequest())
    reference = laws(local, text[:90], DecodeRequest(epsilon=0.005))
    distances = [
        np.abs(left - right).sum() / 2
        for (coarse, _, _), (fine, _, _) in zip(default, reference, strict=True)
        for left, right in zip(coarse, fine, strict=True)
    ]
    assert float(np.mean(distances)) <= DecodeRequest().epsilon / 2
    assert all(certificate <= DecodeRequest().epsilon for _, certificate, _ in default)


def test_a_prompt_that_ends_inside_a_word_is_continued(local: LocalEnsemble) -> None:
    text, finish = local.generate("Paris is the capital of Fra", UNIFORM, DecodeRequest(sampling=GREEDY, max_bytes=3))
    assert text == "nce"
    assert finish.reason is FinishReason.MAX_BYTES
