"""Prompts as a tokenizer reads them: chat templates that fail, and the prompt that is empty."""

from __future__ import annotations

import logging

import pytest

from tests.conftest import tiny_tokenizer
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.experts.tokenizer.prompt import PromptEncoder
from token_swarm.experts.tokenizer.spec import eos_ids_of, vocabulary_of

FAILING = {
    "raise_exception": ("{{ raise_exception('Only system first, please') }}", "Only system first, please"),
    "undefined": ("{{ nobody.knows.this }}", "'nobody' is undefined"),
    "syntax": ("{% for x in %}", "Expected an expression"),
    "type": ("{{ 1 + messages[0]['content'] }}", "unsupported operand"),
}


def encoder(template: str | None = None, *, bos: bool = True, eos: bool = True) -> PromptEncoder:
    tokenizer = tiny_tokenizer(chat=False)
    eos_ids = eos_ids_of(None, None, tokenizer) if eos else ()
    vocabulary = vocabulary_of(tokenizer, width=400, eos_ids=eos_ids)
    if not bos:
        tokenizer.bos_token = None
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, Numbering(vocabulary))


@pytest.mark.parametrize(("template", "sentence"), FAILING.values(), ids=FAILING.keys())
def test_a_template_that_fails_is_told_at_load_and_in_the_refusal(caplog, template, sentence):
    with caplog.at_level(logging.WARNING):
        broken = encoder(template)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("requests with chat will be refused: the model's chat template fails")
    assert sentence in caplog.messages[0]
    with pytest.raises(ValueError, match="chat template fails for a user message: ") as caught:
        broken.encode("hello", chat=True)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert broken.encode("hello", chat=False).tokens


def test_a_template_that_refuses_one_prompt_is_no_warning(caplog):
    picky = "{% if messages[0]['content']|length > 9 %}{{ raise_exception('Too long') }}{% endif %}hello"
    with caplog.at_level(logging.WARNING):
        prompts = encoder(picky)
    assert caplog.messages == []
    assert prompts.encode("short", chat=True).tokens
    with pytest.raises(ValueError, match="Too long"):
        prompts.encode("longer than nine", chat=True)


def test_an_empty_prompt_is_where_texts_begin():
    tokenizer = tiny_tokenizer()
    prompts = encoder()
    assert list(prompts._numbering.to_model(prompts.encode("", chat=False).tokens)) == [tokenizer.bos_token_id]
    without = encoder(bos=False)
    assert list(without._numbering.to_model(without.encode("", chat=False).tokens)) == [tokenizer.eos_token_id]
    assert without.encode("", chat=False).tail == 0
    with pytest.raises(ValueError, match="no token to start a text with"):
        encoder(bos=False, eos=False).encode("", chat=False)
