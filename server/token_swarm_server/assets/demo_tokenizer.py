"""The tokenizer of a GGUF file as `tokenizer.json`: byte-level BPE, and Gemma's SentencePiece BPE.

A GGUF file holds the tokens, the merges of a byte-level BPE and the name of its pre-tokenizer; the steps before and
after the BPE come from here. Loading them through transformers instead takes 20 s of processor time and more, and the
result differs between its versions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Types of token: special, matched whole in any text, and padding up to a round number of logits."""

_SPACE = "▁"
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLIT = {"type": "Split", "pattern": {"Regex": _QWEN2_PIECES}, "behavior": "Isolated", "invert": False}


def _byte_level(*, prefix: bool, regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


_PRE_TOKENIZERS: Mapping[str, tuple[Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]] = {
    "smollm": (None, (_DIGITS, _byte_level(prefix=False, regex=True))),
    "qwen2": ({"type": "NFC"}, (_SPLIT, _byte_level(prefix=False, regex=False))),
}
"""Normaliser and pre-tokenizer of byte-level BPE by their name in GGUF."""


def tokenizer_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of a GGUF file. Raises ValueError: a kind of tokenizer, or a pre-tokenizer, not known here."""
    kind = metadata["tokenizer.ggml.model"]
    if kind == "gpt2":
        steps = _byte_level_steps(metadata)
    elif kind == "llama" and metadata["general.architecture"].startswith("gemma"):
        steps = _gemma_steps(metadata)
    else:
        raise ValueError(f"tokenizer.ggml.model: {kind!r}; known: gpt2, and llama of a Gemma model")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(metadata, steps["model"]["vocab"])),
        **steps,
        "post_processor": _post_processor(metadata),
    }


def tokenizer_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: which of the tokens begin, end and pad a text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    # GGUF's own names of the roles. A class both transformers 4 and 5 know for "whatever tokenizer.json says".
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in roles.items():
        if (index := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{role}_token"] = tokens[index]
    return config


def _added_tokens(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (_CONTROL, _USER_DEFINED) and token in vocabulary:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            yield {"id": index, "content": token, **flags, "special": kind == _CONTROL}


def _vocabulary(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, int]:
    """Ids of the tokens that the model was trained with."""
    types = metadata["tokenizer.ggml.token_type"]
    return {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}


def _byte_level_steps(metadata: Mapping[str, Any]) -> dict[str, Any]:
    name = metadata["tokenizer.ggml.pre"]
    if name not in _PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre: {name!r}; known: {', '.join(_PRE_TOKENIZERS)}")
    normalizer, pieces = _PRE_TOKENIZERS[name]
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pieces)},
        "decoder": _byte_level(prefix=True, regex=True),
        "model": _bpe(_vocabulary(metadata, metadata["tokenizer.ggml.tokens"]), merges, byte_fallback=False),
    }


def _gemma_steps(metadata: Mapping[str, Any]) -> dict[str, Any]:
    # Tokens of several spaces are stored as such; all others spell a space as the mark.
    tokens = [_SPACE * len(t) if " " in t and not t.strip() else t for t in metadata["tokenizer.ggml.tokens"]]
    vocabulary = _vocabulary(metadata, tokens)
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _bpe(vocabulary, _merges_of(vocabulary), byte_fallback=True) | {"unk_token": "<unk>"},
    }


def _merges_of(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that a vocabulary in the order of its merges implies: every way to cut a token into two tokens.

    Of one token's, those with the longer left part come first.
    """
    merges: list[tuple[str, str]] = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(len(token) - 1, 0, -1))
        merges += [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
    return merges


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], *, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None if byte_fallback else "",
        "end_of_word_suffix": None if byte_fallback else "",
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _post_processor(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What stands before a text: the token that begins one, where the model was trained with it."""
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    if not metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama"):
        return {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    index = metadata["tokenizer.ggml.bos_token_id"]
    token = metadata["tokenizer.ggml.tokens"][index]
    starts = [{"SpecialToken": {"id": token, "type_id": type_id}} for type_id in (0, 1)]
    return {
        "type": "TemplateProcessing",
        "single": [starts[0], first],
        "pair": list(itertools.chain.from_iterable(zip(starts, (first, second), strict=True))),
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
