"""Token bytes of tiny tokenizers of every kind, built here."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from token_swarm.experts.tokenizer.token_bytes import (
    PROBE_TEXT,
    TokenizerError,
    canonical_digest,
    check_round_trip,
    eos_ids_of,
    has_dummy_prefix,
    vocabulary_of,
)
from token_swarm.vocabulary import Vocabulary

CORPUS = [
    "the cat sat on the mat, the cat sat",
    "das ist ein Käse und der Käse ist gut",
    "x = [1, 2]\n\n\tx",
] * 3


def wrap(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def byte_level(*, normalizer: Any = None) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return wrap(backend)


def sentencepiece(*, dummy_prefix: bool = False, byte_fallback: bool = True, metaspace: bool = False) -> Any:
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    pieces += ["▁", *"abcdehinost", "th", "the", "▁t", "▁the", "ca", "cat", "▁▁", "é"]
    merges = [("t", "h"), ("th", "e"), ("▁", "t"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "▁")]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    if metaspace:
        scheme = "first" if dummy_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence([*fallback, decoders.Metaspace(prepend_scheme=scheme)])
    else:
        replace = normalizers.Replace(" ", "▁")
        steps = [normalizers.Prepend("▁"), replace] if dummy_prefix else [replace]
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback])
    backend.add_special_tokens(["<unk>", "<eos>"])
    return wrap(backend)


def vocabulary(tokenizer: Any, extra: int = 0) -> Vocabulary:
    return vocabulary_of(tokenizer, width=len(tokenizer) + extra, eos_ids=[tokenizer.eos_token_id])


def written(tokenizer: Any, text: str) -> bytes:
    return vocabulary(tokenizer).text(tokenizer.encode(text, add_special_tokens=False))


def test_byte_level_tokens() -> None:
    tokenizer = byte_level()
    table = vocabulary(tokenizer, extra=3)
    ids = tokenizer.get_vocab()
    assert table.token_bytes[ids["Ġthe"]] == b" the"
    assert table.token_bytes[ids["Ã"]] == b"\xc3"
    assert table.token_bytes[ids["Ċ"]] == b"\n"
    assert {bytes([byte]) for byte in range(256)} <= set(table.token_bytes)
    assert table.token_bytes[ids["<eos>"]] is None
    assert table.token_bytes[ids["<unk>"]] is None
    assert table.token_bytes[-3:] == (None, None, None)
    assert table.eos_ids == (ids["<eos>"],)
    check_round_trip(tokenizer, table)
    assert not has_dummy_prefix(tokenizer, table)


BYTE_LEVEL = byte_level()
BYTE_LEVEL_VOCABULARY = vocabulary(BYTE_LEVEL)


@given(st.text())
def test_byte_level_round_trips_any_text(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert BYTE_LEVEL_VOCABULARY.text(tokens) == text.encode()


SENTENCEPIECE = sentencepiece()
SENTENCEPIECE_VOCABULARY = vocabulary(SENTENCEPIECE)


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_sentencepiece_round_trips_any_text_without_its_space_mark(text: str) -> None:
    tokens = SENTENCEPIECE.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert SENTENCEPIECE_VOCABULARY.text(tokens) == text.encode()


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_sentencepiece_tokens(dummy_prefix: bool, metaspace: bool) -> None:
    tokenizer = sentencepiece(dummy_prefix=dummy_prefix, metaspace=metaspace)
    table = vocabulary(tokenizer)
    ids = tokenizer.get_vocab()
    assert table.token_bytes[ids["▁the"]] == b" the"
    assert table.token_bytes[ids["▁▁"]] == b"  "
    assert table.token_bytes[ids["<0x0A>"]] == b"\n"
    assert table.token_bytes[ids["<0xFF>"]] == b"\xff"
    assert table.token_bytes[ids["é"]] == "é".encode()
    assert has_dummy_prefix(tokenizer, table) is dummy_prefix
    assert written(tokenizer, "the cat\n") == b" " * dummy_prefix + b"the cat\n"
    check_round_trip(tokenizer, table)


def test_byte_and_character_may_share_bytes() -> None:
    table = vocabulary(sentencepiece())
    assert table.token_bytes.count(b"a") == 2


def test_a_byte_level_prefix_space_is_a_dummy_prefix() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    table = vocabulary(tokenizer)
    assert has_dummy_prefix(tokenizer, table)
    check_round_trip(tokenizer, table)


def test_a_prefix_space_within_a_text_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    with pytest.raises(TokenizerError, match="'2n': its tokens write b' 2 n'"):
        check_round_trip(tokenizer, vocabulary(tokenizer))


def test_added_tokens_do_not_go_through_the_alphabet() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("Ġé", normalized=False), AddedToken("   ", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    table = vocabulary(tokenizer)
    assert table.token_bytes[tokenizer.convert_tokens_to_ids("Ġé")] == "Ġé".encode()
    assert table.token_bytes[tokenizer.convert_tokens_to_ids("   ")] == b"   "
    assert table.token_bytes[tokenizer.convert_tokens_to_ids("<end>")] is None
    assert written(tokenizer, "aĠé   b") == "aĠé   b".encode()
    check_round_trip(tokenizer, table)


def test_an_added_token_of_sentencepiece_spells_spaces_as_the_others_do() -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False), AddedToken("\n\n", normalized=False)])
    table = vocabulary(tokenizer)
    assert table.token_bytes[tokenizer.convert_tokens_to_ids("▁▁▁")] == b"   "
    assert table.token_bytes[tokenizer.convert_tokens_to_ids("\n\n")] == b"\n\n"
    check_round_trip(tokenizer, table)


def test_an_eos_that_is_not_special_has_no_bytes() -> None:
    tokenizer = byte_level()
    end = tokenizer.get_vocab()["."] if "." in tokenizer.get_vocab() else tokenizer.get_vocab()["!"]
    table = vocabulary_of(tokenizer, width=len(tokenizer), eos_ids=[end])
    assert table.token_bytes[end] is None
    assert table.eos_ids == (end,)


@pytest.mark.parametrize(
    ("tokenizer", "piece"),
    [
        (byte_level(normalizer=normalizers.Lowercase()), "'T'"),
        (byte_level(normalizer=normalizers.NFKC()), r"'Ａ'"),
        (byte_level(normalizer=normalizers.Strip()), "' '"),
        (sentencepiece(byte_fallback=False), "'T'"),
    ],
    ids=["lower case", "NFKC", "strip", "no byte fallback"],
)
def test_a_tokenizer_that_changes_text_is_refused_with_the_smallest_piece(tokenizer: Any, piece: str) -> None:
    with pytest.raises(TokenizerError, match=f"does not reproduce the text {piece}"):
        check_round_trip(tokenizer, vocabulary(tokenizer))


def test_nfc_is_let_pass() -> None:
    assert unicodedata.is_normalized("NFC", PROBE_TEXT)
    tokenizer = byte_level(normalizer=normalizers.NFC())
    check_round_trip(tokenizer, vocabulary(tokenizer))


def test_unsupported_kinds_are_refused() -> None:
    word_piece = Tokenizer(models.WordPiece(vocab={"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    with pytest.raises(
        TokenizerError, match=r"PreTrainedTokenizerFast|TokenizersBackend.*WordPiece.*supported: "
    ):
        vocabulary(wrap(word_piece))
    suffixes = Tokenizer(
        models.BPE(vocab={"<unk>": 0, "<eos>": 1, "a</w>": 2}, merges=[], end_of_word_suffix="</w>")
    )
    suffixes.decoder = decoders.BPEDecoder()
    with pytest.raises(TokenizerError, match=r"unknown decoder \(BPEDecoder\); supported: "):
        vocabulary(wrap(suffixes))
    bare = Tokenizer(models.BPE(vocab={"<unk>": 0, "<eos>": 1, "a": 2}, merges=[]))
    with pytest.raises(TokenizerError, match=r"unknown decoder \(none\)"):
        vocabulary(wrap(bare))
    with pytest.raises(TokenizerError, match=r"SimpleNamespace has no tokenizer\.json"):
        vocabulary_of(SimpleNamespace(), width=3, eos_ids=[])


def test_ids_beyond_the_logits_are_refused() -> None:
    tokenizer = byte_level()
    with pytest.raises(TokenizerError, match=r"token \d+ \('.*'\) is beyond the model's 290 logits"):
        vocabulary_of(tokenizer, width=290, eos_ids=[1])
    with pytest.raises(TokenizerError, match="end-of-text token 999 is beyond"):
        vocabulary_of(tokenizer, width=len(tokenizer), eos_ids=[999])


def test_eos_ids_are_the_union() -> None:
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    config, generation = SimpleNamespace(eos_token_id=7), SimpleNamespace(eos_token_id=[9, 7])
    assert eos_ids_of(config, generation, tokenizer) == tuple(sorted({eos, 7, 9}))
    assert eos_ids_of(None, SimpleNamespace(eos_token_id=None), tokenizer) == (eos,)


def test_canonical_digest_tells_splits_apart() -> None:
    plain, prefixed = sentencepiece(), sentencepiece(dummy_prefix=True)
    assert vocabulary(plain).fingerprint == vocabulary(prefixed).fingerprint
    assert canonical_digest(plain) == canonical_digest(sentencepiece())
    assert canonical_digest(plain) != canonical_digest(prefixed)
