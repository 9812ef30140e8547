"""Text to tokens with a Hugging Face tokenizer: what is private to the expert, and what must stay plain text."""

from __future__ import annotations

import logging
import threading
from typing import Any

from token_swarm.errors import TextChanged
from token_swarm.experts.contract import EncodedPrompt
from token_swarm.experts.tokenizer.numbering import Numbering

logger = logging.getLogger(__name__)

# Private-use characters: no template holds them and no template trims them.
_PLACE = "\ue000\ue001\ue000"


class PromptEncoder:
    """Encodes prompts and texts, in the expert's ids, so that what a user wrote never becomes a special token."""

    def __init__(self, tokenizer: Any, numbering: Numbering) -> None:
        self._tokenizer = tokenizer
        self._numbering = numbering
        self._vocabulary = numbering.vocabulary
        # `split_special_tokens` is set on the shared backend for the length of a call.
        self._lock = threading.Lock()
        added = tokenizer.added_tokens_decoder.values()
        self._special = tuple(str(token) for token in added if token.special)
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        if self.has_chat_template:
            self._try_template()

    def _try_template(self) -> None:
        """Render one turn of a user, so that whoever starts the expert reads about a template that cannot."""
        try:
            self._render("Hello")
        except ValueError as error:
            logger.warning("requests with chat will be refused: %s", error)

    def encode(self, prompt: str, *, chat: bool) -> EncodedPrompt:
        """See `Expert.encode`. Raises ValueError for a prompt that the chat template refuses or renders unsafely."""
        if chat and self.has_chat_template:
            tokens = self._chat(prompt)
        else:
            tokens = self._encode(prompt, private=True, special=False)
        if not tokens:
            tokens = (self._start(),)
        return EncodedPrompt(tokens, len(self._vocabulary.text(tokens[-1:])))

    def tokenize(self, text: str) -> tuple[int, ...]:
        """See `Expert.tokenize`. Raises TextChanged when the tokens would not write `text`."""
        tokens = self._encode(text, private=False, special=False)
        written = self._vocabulary.text(tokens)
        if written != text.encode():
            raise TextChanged(text, written)
        return tokens

    def _encode(self, text: str, *, private: bool, special: bool) -> tuple[int, ...]:
        """`private`: add BOS and the like; `special`: read special tokens in `text` as such."""
        with self._lock:
            tokens: list[int] = self._tokenizer.encode(
                text, add_special_tokens=private, split_special_tokens=not special
            )
        return self._numbering.from_model(tokens)

    def _chat(self, prompt: str) -> tuple[int, ...]:
        rendered = self._render(prompt)
        if not any(token in prompt for token in self._special):
            return self._encode(rendered, private=False, special=True)
        # The template's own special tokens stand before and after the user's text, which stays plain.
        before, place, after = self._render(_PLACE).partition(_PLACE)
        inside = len(rendered) - len(after)
        safe = place and _PLACE not in after and rendered.startswith(before) and rendered.endswith(after)
        if not safe or inside < len(before):
            raise ValueError("prompt: it holds a special token of the model, and the chat template alters it")
        return (
            *self._encode(before, private=False, special=True),
            *self._encode(rendered[len(before) : inside], private=False, special=False),
            *self._encode(after, private=False, special=True),
        )

    def _render(self, prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        try:
            rendered: str = self._tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            # The template is a program of the model's authors: whatever it raises is its answer to the prompt.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the model's chat template fails for a user message: {reason}") from error
        return rendered

    def _start(self) -> int:
        bos: int | None = self._tokenizer.bos_token_id
        if bos is not None:
            return self._numbering.from_model([bos])[0]
        if not self._vocabulary.eos_ids:
            raise ValueError("prompt: empty, and the tokenizer has no token to start a text with")
        return self._vocabulary.eos_ids[0]
