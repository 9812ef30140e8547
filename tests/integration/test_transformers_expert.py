"""The backend on the demo experts gives what transformers itself gives."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import real_expert_dir
from token_swarm.experts import laws
from token_swarm.experts.contract import Close, Extend, Fork, Open, Rows, Truncate

pytestmark = [pytest.mark.real_experts, pytest.mark.parametrize("name", ["smollm2", "gemma3"])]

PROMPTS = [
    "The history of the printing press begins in",
    "def fibonacci(n):\n    ",
]


@functools.cache
def plain_model(name):
    return AutoModelForCausalLM.from_pretrained(real_expert_dir(name), dtype=torch.float32).eval()


def plain_rows(expert, tokens, count):
    """The last `count` logit rows of a plain forward of the expert's model: [count, width]."""
    inputs = torch.tensor([expert.numbering.to_model(tokens)])
    with torch.inference_mode():
        output = plain_model(expert.spec.name)(inputs, use_cache=False, logits_to_keep=count)
    return output.logits[0][:, expert.numbering.columns]


def largest_difference(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize(("prompt", "length"), list(zip(PROMPTS, (200, 60), strict=True)))
def test_greedy_text_equals_generate(real_expert, name, prompt, length):
    expert = real_expert(name)
    tokens = expert.encode(prompt).tokens
    inputs = torch.tensor([expert.numbering.to_model(tokens)])
    expected = plain_model(name).generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=length
    )
    expected = list(expert.numbering.from_model(expected[0, len(tokens) :].tolist()))
    found = []
    rows = expert.step([Open(0, tokens)]).rows(0)
    while len(found) < length:
        found.append(int(rows[-1].argmax()))
        if found[-1] in expert.spec.vocabulary.eos_ids:
            break
        rows = expert.step([Extend(0, (found[-1],))]).rows(0)
    expert.step([Close(0)])
    assert found == expected


def test_rows_equal_the_plain_forward_past_the_sliding_window(real_expert, name):
    """Gemma 3 looks back 512 tokens: prefill, single steps, rollback and fork around and beyond that."""
    expert = real_expert(name)
    tokens = laws.random_tokens(expert, np.random.default_rng(0), 640)
    other = laws.random_tokens(expert, np.random.default_rng(1), 6)
    first = expert.step([Open(0, tokens[:505]), Open(1, tokens[:3], Rows.ALL)])
    assert largest_difference(first.rows(0), plain_rows(expert, tokens[:505], 1)) < 1e-3
    assert largest_difference(first.rows(1), plain_rows(expert, tokens[:3], 3)) < 1e-3
    expected = plain_rows(expert, tokens, 135)
    at = 505
    for count in (1, 5, 1, 1, 1, 60, 1, 64):
        row = expert.step([Extend(0, tokens[at : at + count], Rows.ALL), Extend(1, other[:1])]).rows(0)
        assert largest_difference(row, expected[at - 505 : at - 505 + count]) < 1e-3
        at += count
    expert.step([Fork(0, 2), Truncate(0, 508), Truncate(2, 560)])
    rows = expert.step([Extend(0, other, Rows.ALL), Extend(2, other, Rows.ALL)])
    assert largest_difference(rows.rows(0), plain_rows(expert, tokens[:508] + other, 6)) < 1e-3
    assert largest_difference(rows.rows(1), plain_rows(expert, tokens[:560] + other, 6)) < 1e-3
    expert.step([Close(number) for number in range(3)])


def test_a_row_has_the_same_bits_whatever_texts_are_beside_it(real_expert, name):
    """What the promise that a text is the same alone and among others rests on, in float32."""
    expert = real_expert(name)
    texts = [expert.encode(text).tokens for text in ("In the beginning", "def f(x):", "The cat", "1, 2, 3,", "Rain")]

    def rows(chosen):
        opened = expert.step([Open(number, texts[number], Rows.ALL) for number in chosen])
        extended = expert.step([Extend(number, texts[number][:1]) for number in chosen])
        expert.step([Close(number) for number in chosen])
        return {number: (opened.rows(at), extended.rows(at)) for at, number in enumerate(chosen)}

    together = rows(range(len(texts)))
    for number in range(len(texts)):
        (alone,) = rows([number]).values()
        for found, expected in zip(together[number], alone, strict=True):
            assert torch.equal(found, expected)


def test_fresh_rows_equal_the_plain_forward(real_expert, name):
    """Ties to the plain model what the laws (tests/laws/test_expert_laws.py) hold random operations against."""
    expert = real_expert(name)
    tokens = laws.random_tokens(expert, np.random.default_rng(2), 90)
    assert largest_difference(laws.fresh_rows(expert, tokens), plain_rows(expert, tokens, 90)) < 1e-3
