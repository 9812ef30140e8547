"""Every expert keeps the laws of the contract; an expert that does not is caught."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import CORPUS, TINY_MODELS
from token_swarm.experts import laws, ops, planned
from token_swarm.experts.contract import Truncate
from token_swarm.experts.toy import TextLawExpert, ToyExpert, random_text_law
from token_swarm.vocabulary import Vocabulary

VOCABULARY = Vocabulary((None, b"a", b"b", b"c", b"ab", b"ab", b"abc", b"abca", b"ca", None), eos_ids=(0,))
TEXTS = ["", "a", "abcab", "cccab"]


def toy(**options):
    return ToyExpert("toy", VOCABULARY, seed=3, max_sequences=5, max_context=50, **options)


def text_law():
    law = random_text_law(b"abc", seed=1)
    return TextLawExpert("text", VOCABULARY, law, max_sequences=5, max_context=50)


TOYS = {"toy": toy, "toy of order 2": lambda: toy(order=2), "text law": text_law}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_toy_experts_keep_the_laws(make, law):
    law(make(), np.random.default_rng(0), 0.0)


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_toy_experts_write_their_text(make):
    laws.tokenize_writes_the_text(make(), TEXTS)


# Logits of the tiny models have a standard deviation of 1.1; what a law finds wrong is off by several times that.
ROUNDING = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_transformers_experts_keep_the_laws(tiny_expert, name, dtype, law):
    law(tiny_expert(name, dtype), np.random.default_rng(0), ROUNDING[dtype])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_transformers_experts_write_their_text(tiny_expert, name):
    laws.tokenize_writes_the_text(tiny_expert(name), [*CORPUS, "", "<|end|><|bos|>", " \n x"])


# Filling 800 tokens of context is left to the tiny models.
REAL_LAWS = [law for law in laws.LAWS if law is not laws.context_full_is_an_error]


@pytest.mark.real_experts
@pytest.mark.parametrize("law", REAL_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_experts_keep_the_laws(real_expert, name, law):
    law(real_expert(name), np.random.default_rng(0), 1e-3)


@pytest.mark.real_experts
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_experts_write_their_text(real_expert, name):
    laws.tokenize_writes_the_text(real_expert(name), [*CORPUS, "", "<|im_end|><eos>", " \n x", "\t\tif 12345:\r\n"])


class ForgetsRollback(ToyExpert):
    """Keeps the tokens that a truncate takes back."""

    def step(self, ops):
        return super().step([Truncate(op.sequence, 0) if isinstance(op, Truncate) else op for op in ops])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("law", [laws.truncate_then_extend_equals_fresh, laws.random_operations_equal_fresh])
def test_a_broken_rollback_is_caught_in_every_dtype(tiny_expert, law, dtype, monkeypatch):
    expert = tiny_expert("llama", dtype)
    lengths = ops.apply_lengths

    def one_too_many(op, held):
        lengths(op, held)
        if isinstance(op, Truncate) and held[op.sequence]:
            held[op.sequence] -= 1

    monkeypatch.setattr(planned, "apply_lengths", one_too_many)
    with pytest.raises(AssertionError, match="logits differ by"):
        law(expert, np.random.default_rng(0), ROUNDING[dtype])


@pytest.mark.parametrize("law", [laws.truncate_then_extend_equals_fresh, laws.random_operations_equal_fresh])
def test_a_broken_rollback_is_caught(law):
    expert = ForgetsRollback("broken", VOCABULARY)
    with pytest.raises(AssertionError, match="logits differ by"):
        law(expert, np.random.default_rng(0), 0.0)
