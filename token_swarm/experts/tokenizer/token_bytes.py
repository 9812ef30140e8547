"""The true bytes of every token of a Hugging Face tokenizer, and the checks that they are true."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from token_swarm.vocabulary import Vocabulary

_SUPPORTED = "supported: byte-level BPE, and SentencePiece-style BPE or Unigram"
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}

# Everything here is in NFC and free of U+2581: normalising to NFC and reading "▁" as a space lose nothing a
# model would write, and widely used tokenizers do them. NFKC, lower case and unknown characters are caught.
PROBE_PIECES: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog's 2nd fence, doesn't it?",
    " one leading space",
    "one trailing space ",
    "   three spaces,  two,    four, then a line of them\n        \n",
    "tabs\t\tand\ttabs\r\nCRLF\r\n\r\nlone\rreturn\n\n\n",
    "def f(x: int) -> str:\n    return f\"{x!r:>8}\" if x != 0 else '\\n'  # 0x1F && a<=b;\n",
    "3.14159, 1,000,000, 2024-02-29, 007, 1e-9, 12345678901234567890",
    "MiXeD CaSe, ÀÉÎÕÜ, ß, İstanbul, ŁÓDŹ",
    "русский текст, ελληνικά, עִבְרִית, العَرَبِيَّة, हिन्दी, ไทย, ქართული",
    "中文字符,日本語のテキスト、カタカナ。한국어",
    "fullwidth ＡＢＣ１２３, ligature ﬁ, ① ½ ² ™ …",
    "q\u0303 x\u0331\u0302 combining",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 🫨",
    "\ufeffbom, zero\u200bwidth, no\u00a0break, soft\u00adhyphen, \u2028line, \u202edirection",
    "\x01\x07\x1b[0m\x7f\x85 controls",
    "rare: 𓀀 𝔘𝔫𝔦 𐍈 \U000e0041 \U0010fffd \ue000",
    "<p class='a'>&amp;</p> http://example.org/?q=%20#x @user #tag $5 50% a_b *c* ~~d~~",
)
PROBE_TEXT = "".join(PROBE_PIECES)


class TokenizerError(ValueError):
    """A tokenizer that cannot take part in an ensemble. The message names its class and the reason."""


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, *, width: int, eos_ids: Sequence[int]) -> Vocabulary:
    """Bytes of every id below `width`, the number of logits in a row.

    Special tokens, end-of-text tokens and ids the tokenizer does not know have none. An added token that is
    not special writes its content. Raises TokenizerError: an unsupported kind of tokenizer, or one whose ids
    do not fit into `width`.
    """
    name = type(tokenizer).__name__
    bytes_of = _token_to_bytes(tokenizer)
    added = tokenizer.added_tokens_decoder
    silent = {index for index, token in added.items() if token.special}
    silent.update(tokenizer.all_special_ids, eos_ids)
    table: list[bytes | None] = [None] * width
    for token, index in tokenizer.get_vocab().items():
        if index in silent:
            continue
        if index >= width:
            raise TokenizerError(f"{name}: token {index} ({token!r}) is beyond the model's {width} logits")
        # "" writes nothing and so has no bytes.
        table[index] = (bytes_of.added(token) if index in added else bytes_of(token)) or None
    outside = [index for index in eos_ids if not 0 <= index < width]
    if outside:
        raise TokenizerError(f"{name}: end-of-text token {outside[0]} is beyond the model's {width} logits")
    try:
        return Vocabulary(tuple(table), tuple(eos_ids))
    except ValueError as error:
        raise TokenizerError(f"{name}: {error}") from error


def eos_ids_of(config: Any, generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a text, sorted: of both configurations (each may be None) and the tokenizer."""
    found: set[int] = set()
    for source in (config, generation_config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update(value if isinstance(value, list | tuple) else [value])
    return tuple(sorted(found))


def has_dummy_prefix(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> bool:
    """Whether the tokenizer puts a space before a text that does not start with one."""
    return _written(tokenizer, vocabulary, "x") == b" x"


def check_round_trip(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
    """Check that the tokens of an adversarial text write that text again, but for a dummy prefix.

    Raises TokenizerError with the shortest piece of the text that comes out different, and what comes out.
    """
    optional = b" " if has_dummy_prefix(tokenizer, vocabulary) else b""

    def fails(text: str) -> bool:
        return _written(tokenizer, vocabulary, text) not in (text.encode(), optional + text.encode())

    pairs = [first + second for first, second in itertools.pairwise(PROBE_PIECES)]
    for text in (*PROBE_PIECES, *pairs, PROBE_TEXT):
        if fails(text):
            # Characters at fault are few: one or two in a row show nearly every fault there is.
            short = (text[i : i + n] for n in (1, 2, 3) for i in range(len(text) - n + 1))
            piece = next((part for part in short if fails(part)), text)
            raise TokenizerError(
                f"{type(tokenizer).__name__} does not reproduce the text {piece!r}: its tokens write "
                f"{_written(tokenizer, vocabulary, piece)!r}, and an expert must keep a text as it is"
            )


def canonical_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the token ids of the probe text: equal when two tokenizers split text alike."""
    ids = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def _written(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, text: str) -> bytes:
    return vocabulary.text(tokenizer.encode(text, add_special_tokens=False))


class _ByteLevel:
    """The GPT-2 alphabet, in which every byte is one printable character."""

    def __init__(self) -> None:
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [byte for byte in range(256) if byte not in plain]
        self._byte_of = {chr(byte): byte for byte in plain}
        self._byte_of |= {chr(256 + offset): byte for offset, byte in enumerate(rest)}

    def __call__(self, token: str) -> bytes:
        try:
            return bytes(self._byte_of[character] for character in token)
        except KeyError:
            # The tokenizers library decodes a token with a character outside the alphabet as it stands.
            return token.encode()

    def added(self, token: str) -> bytes:
        # Added tokens are matched in the text itself, before it is rewritten in the alphabet.
        return token.encode()


class _SentencePiece:
    """`▁` is a space and, with byte fallback, `<0xNN>` is one byte."""

    def __init__(self, *, byte_fallback: bool) -> None:
        self._byte_fallback = byte_fallback

    def __call__(self, token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else self.added(token)

    def added(self, token: str) -> bytes:
        return token.replace(_SPACE, " ").encode()


def _token_to_bytes(tokenizer: PreTrainedTokenizerBase) -> _ByteLevel | _SentencePiece:
    name = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"{name} has no tokenizer.json to read its tokens from; {_SUPPORTED}")
    model = type(backend.model).__name__
    if model not in ("BPE", "Unigram"):
        raise TokenizerError(f"{name} is a {model} tokenizer; {_SUPPORTED}")
    decoder = list(_steps(backend.decoder))
    kinds = {step["type"] for step in decoder}
    if "ByteLevel" in kinds or any(step["type"] == "ByteLevel" for step in _steps(backend.pre_tokenizer)):
        return _ByteLevel()
    if kinds <= _SENTENCEPIECE_STEPS and any(_restores_spaces(step) for step in decoder):
        byte_fallback = "ByteFallback" in kinds or bool(getattr(backend.model, "byte_fallback", False))
        return _SentencePiece(byte_fallback=byte_fallback)
    described = ", ".join(step["type"] for step in decoder) or "none"
    raise TokenizerError(f"{name} is a {model} tokenizer with an unknown decoder ({described}); {_SUPPORTED}")


def _steps(component: Any) -> Iterable[dict[str, Any]]:
    """The elementary steps of a decoder or pre-tokenizer, as in tokenizer.json; nothing for None."""
    if component is None:
        return
    pending = [json.loads(component.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = [*step.get("decoders", step.get("pretokenizers", [])), *pending]
        else:
            yield step


def _restores_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == _SPACE)
    return bool(
        step["type"] == "Replace" and step["pattern"] == {"String": _SPACE} and step["content"] == " "
    )
