"""Token bytes of the demo experts' tokenizers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tests.conftest import real_expert_dir
from token_swarm.experts.tokenizer.token_bytes import (
    canonical_digest,
    check_round_trip,
    eos_ids_of,
    has_dummy_prefix,
    vocabulary_of,
)
from token_swarm.vocabulary import Vocabulary

NAMES = ("smollm2", "qwen2.5-coder", "gemma3")

pytestmark = pytest.mark.real_experts


@cache
def load(name: str) -> tuple[Any, Vocabulary]:
    directory = real_expert_dir(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    eos_ids = eos_ids_of(config, GenerationConfig.from_pretrained(directory), tokenizer)
    return tokenizer, vocabulary_of(tokenizer, width=config.vocab_size, eos_ids=eos_ids)


@cache
def unwritable(name: str) -> frozenset[int]:
    """Bytes no token of the vocabulary holds."""
    _, vocabulary = load(name)
    return frozenset(range(256)).difference(*(entry for entry in vocabulary.token_bytes if entry))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_the_probe_text(name: str) -> None:
    tokenizer, vocabulary = load(name)
    check_round_trip(tokenizer, vocabulary)
    assert not has_dummy_prefix(tokenizer, vocabulary)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_round_trip_of_any_text(name: str, text: str) -> None:
    tokenizer, vocabulary = load(name)
    missing = unwritable(name)
    kept = "".join(c for c in text if missing.isdisjoint(c.encode()) and c != "▁")
    if name == "qwen2.5-coder":
        kept = unicodedata.normalize("NFC", kept)
    tokens = tokenizer.encode(kept, add_special_tokens=False, split_special_tokens=True)
    assert vocabulary.text(tokens) == kept.encode()


def test_bytes_no_token_writes() -> None:
    controls, never_in_utf8 = {4, 6, 19, 20, 22, 29}, {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert unwritable("smollm2") == controls | {0xF1, 0xF2} | never_in_utf8
    assert unwritable("qwen2.5-coder") == set()
    assert unwritable("gemma3") == set()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_agree_with_decode_where_a_token_is_whole_characters(name: str) -> None:
    tokenizer, vocabulary = load(name)
    for token in range(0, vocabulary.width, 7):
        data = vocabulary.token_bytes[token]
        if data is None or "�" in data.decode(errors="replace"):
            continue
        assert tokenizer.decode([token], clean_up_tokenization_spaces=False) == data.decode()


@pytest.mark.parametrize(
    ("name", "duplicated", "silent"), [("smollm2", 0, 17), ("qwen2.5-coder", 0, 291), ("gemma3", 110, 6249)]
)
def test_duplicates_and_silent_ids(name: str, duplicated: int, silent: int) -> None:
    _, vocabulary = load(name)
    counts = Counter(entry for entry in vocabulary.token_bytes if entry is not None)
    shared = [entry for entry, count in counts.items() if count > 1]
    print(f"{name}: {len(shared)} byte strings belong to more than one id, such as {shared[:8]}")
    assert len(shared) == duplicated
    assert sum(entry is None for entry in vocabulary.token_bytes) == silent


@pytest.mark.parametrize(("name", "eos"), [("smollm2", (2,)), ("qwen2.5-coder", (151643, 151645)), ("gemma3", (1,))])
def test_serialised_form_keeps_the_fingerprint(name: str, eos: tuple[int, ...]) -> None:
    tokenizer, vocabulary = load(name)
    copy = Vocabulary.from_bytes(vocabulary.to_bytes())
    assert copy == vocabulary
    assert copy.fingerprint == vocabulary.fingerprint
    assert copy.eos_ids == eos
    again = AutoTokenizer.from_pretrained(real_expert_dir(name))
    assert canonical_digest(again) == canonical_digest(tokenizer)


def test_the_experts_are_a_group_each() -> None:
    assert len({load(name)[1].fingerprint for name in NAMES}) == len(NAMES)
    assert len({canonical_digest(load(name)[0]) for name in NAMES}) == len(NAMES)
