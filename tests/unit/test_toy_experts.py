"""The toy experts' own promises: reproducible laws, and a text law that no tokenizer changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_swarm.experts.contract import Open, Rows
from token_swarm.experts.toy import END, TextLawExpert, ToyExpert, random_text_law
from token_swarm.vocabulary import Vocabulary

# An end-of-text id, a mark, a duplicate of b"ab", and nested prefixes.
NESTED = Vocabulary((None, b"a", b"b", b"c", b"ab", b"ab", b"abc", b"abca", b"ca", None), eos_ids=(0,))
PLAIN = Vocabulary((b"c", b"b", b"a", None, None, None), eos_ids=(3, 5))
LETTER_PAIRS = tuple(bytes(pair) for pair in itertools.product(b"abc", repeat=2))
PAIRS = Vocabulary((None, b"a", b"b", b"c", *LETTER_PAIRS), eos_ids=(0,))


FROZEN = [
    0.5467297569213782,
    0.04976622427786246,
    0.8476270559796124,
    -0.31351930676860473,
    -0.6626468944836253,
    0.023056093552909575,
]


def text_probability(expert: TextLawExpert, context: tuple[int, ...], text: bytes, *, ends: bool) -> float:
    """Probability that `text` comes next (and the text then ends), summed over every tokenization."""
    vocabulary = expert.spec.vocabulary
    law = expert.law(context).exp().numpy()
    if not text:
        return float(law[list(vocabulary.eos_ids)].sum()) if ends else 1.0
    total = 0.0
    for token, entry in enumerate(vocabulary.token_bytes):
        if entry is None:
            continue
        if text.startswith(entry):
            rest = text[len(entry) :]
            total += float(law[token]) * text_probability(expert, (*context, token), rest, ends=ends)
        elif not ends and entry.startswith(text):
            total += float(law[token])
    return total


def law_probability(law, before: bytes, text: bytes, *, ends: bool) -> float:
    total = 1.0
    for at, byte in enumerate(text):
        total *= law(before + text[:at])[byte]
    return float(total * (law(before + text)[END] if ends else 1.0))


@pytest.mark.parametrize("vocabulary", [NESTED, PLAIN, PAIRS])
@pytest.mark.parametrize("ends", [False, True])
def test_text_law_does_not_depend_on_the_tokenizer(vocabulary, ends):
    law = random_text_law(b"abc", seed=3, order=2, end=0.1)
    expert = TextLawExpert("text", vocabulary, law, seed=5)
    prompt = expert.encode("" if vocabulary is PAIRS else "abca", chat=vocabulary is not PAIRS)
    before = vocabulary.text(prompt.tokens)
    for size in range(1, 5):
        for letters in itertools.product(b"abc", repeat=size):
            text = bytes(letters)
            found = text_probability(expert, prompt.tokens, text, ends=ends)
            assert found == pytest.approx(law_probability(law, before, text, ends=ends), rel=1e-12)


def test_text_law_rows_are_normalised_over_allowed_ids():
    expert = TextLawExpert("text", NESTED, random_text_law(b"abc", end=0.2))
    for context in [(9,), (9, 4), (1, 2, 3), (6, 7)]:
        row = expert.law(context).exp().numpy()
        assert row[NESTED.allowed].sum() == pytest.approx(1.0, abs=1e-12)


def test_a_complete_vocabulary_without_an_end_follows_the_text_law_after_every_token():
    law = random_text_law(b"abc", end=0.0)
    expert = TextLawExpert("text", PAIRS, law)
    tokens = expert.tokenize("abcab")
    first = {byte: text_probability(expert, tokens, bytes((byte,)), ends=False) for byte in b"abc"}
    assert first == pytest.approx({byte: law(b"abcab")[byte] for byte in b"abc"}, rel=1e-12)


def test_text_law_refuses_what_it_cannot_write():
    with pytest.raises(ValueError, match=r"b'abc' is a token, so its prefix b'ab'"):
        TextLawExpert("text", Vocabulary((None, b"a", b"abc"), (0,)), random_text_law(b"a"))
    with pytest.raises(ValueError, match="no token starts with it"):
        TextLawExpert("text", PLAIN, random_text_law(b"abcd")).law((0,))
    with pytest.raises(ValueError, match="no end-of-text id"):
        TextLawExpert("text", Vocabulary((b"a", None), ()), random_text_law(b"a")).law((0,))


def test_toy_law_reads_the_whole_context_or_the_last_tokens():
    whole = ToyExpert("toy", NESTED, seed=1)
    recent = ToyExpert("toy", NESTED, seed=1, order=2)
    assert not torch.equal(whole.law((1, 2, 3)), whole.law((2, 2, 3)))
    assert torch.equal(recent.law((1, 2, 3)), recent.law((2, 2, 3)))
    assert not torch.equal(recent.law((1, 2, 3)), recent.law((1, 3, 3)))
    assert torch.equal(whole.law((1, 2)), ToyExpert("toy", NESTED, seed=1).law((1, 2)))
    assert not torch.equal(whole.law((1, 2)), ToyExpert("toy", NESTED, seed=2).law((1, 2)))
    sharp = ToyExpert("toy", NESTED, seed=1, sharpness=3.0)
    torch.testing.assert_close(sharp.law((1, 2)), 3.0 * whole.law((1, 2)))


def test_toy_law_is_the_same_on_every_machine():
    row = ToyExpert("toy", PLAIN, seed=7).law((0, 1)).numpy()
    np.testing.assert_allclose(row, FROZEN, rtol=1e-12)


@given(st.text(alphabet="abc", max_size=20))
def test_tokenize_writes_the_text(text):
    for vocabulary in (NESTED, PLAIN):
        expert = ToyExpert("toy", vocabulary)
        assert vocabulary.text(expert.tokenize(text)) == text.encode()


@given(st.text(max_size=10))
def test_tokenize_refuses_what_no_token_writes(text):
    expert = ToyExpert("toy", PLAIN)
    if set(text) <= set("abc"):
        assert PLAIN.text(expert.tokenize(text)) == text.encode()
    else:
        with pytest.raises(ValueError, match="no token of toy writes"):
            expert.tokenize(text)


def test_encode_marks_the_start_and_the_chat_turn():
    expert = ToyExpert("toy", NESTED)
    assert expert.spec.has_chat_template
    assert expert.encode("cab") == type(expert.encode("a"))((9, 8, 2), 1)
    assert expert.encode("cab", chat=True).tokens == (9, 8, 2, 9)
    assert expert.encode("cab", chat=True).tail == 0
    assert expert.encode("").tokens == (9,)
    bare = ToyExpert("toy", Vocabulary((None, b"a"), (0,)))
    assert bare.encode("", chat=True).tokens == (0,)
    assert bare.encode("a", chat=True).tokens == (1,)
    with pytest.raises(ValueError, match="no token to start a text with"):
        ToyExpert("toy", Vocabulary((b"a",), ())).encode("")


def test_rows_are_float64_and_as_many_as_asked_for():
    expert = ToyExpert("toy", NESTED)
    result = expert.step([Open(0, (1, 2, 3), Rows.ALL), Open(1, (4,), Rows.NONE), Open(2, (1, 2), Rows.LAST)])
    assert result.spans == ((0, 3), (3, 3), (3, 4))
    assert result.logits.dtype == torch.float64
    assert torch.equal(result.rows(2)[0], result.rows(0)[1])
