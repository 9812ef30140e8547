"""Facts about the converted demo experts, read back the ordinary way."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from token_swarm_server.assets.demo_conversion import tokens_sha256
from token_swarm_server.assets.demo_experts import DEMO_EXPERTS, DemoExpert
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import real_expert_dir

NAMES = ("smollm2", "gemma3")

pytestmark = pytest.mark.real_experts


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    torch.set_num_threads(1)
    directory = real_expert_dir(request.param)
    model = AutoModelForCausalLM.from_pretrained(directory)
    return request.param, model.eval(), AutoTokenizer.from_pretrained(directory)


def test_continues_plain_text_sensibly(loaded: tuple[str, Any, Any]) -> None:
    name, model, tokenizer = loaded
    # The base model prefers to go on with " the" after the first prompt, so it is asked the other way round.
    prompt, answer = {
        "smollm2": ("The capital of France is", " Paris"),
        "gemma3": ("Paris is the capital of", " France"),
    }[name]
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == answer


def test_knows_the_capital_of_france(loaded: tuple[str, Any, Any]) -> None:
    _, model, tokenizer = loaded
    with torch.inference_mode():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert " Paris" in [tokenizer.decode([token]) for token in logits.topk(3).indices.tolist()]


def test_weights_are_bfloat16_and_tied(loaded: tuple[str, Any, Any]) -> None:
    name, model, _ = loaded
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    with safe_open(real_expert_dir(name) / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 (safe_open is no mapping)
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("expert", DEMO_EXPERTS, ids=lambda expert: expert.name)
def test_tokens_are_those_that_a_conversion_is_checked_for(expert: DemoExpert) -> None:
    assert tokens_sha256(real_expert_dir(expert.name)) == expert.probe_sha256


def test_answers_in_chat_form() -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_expert_dir("smollm2"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert AutoTokenizer.from_pretrained(real_expert_dir("gemma3")).chat_template is None


def test_smollm2_tokenizer_is_the_published_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_expert_dir("smollm2"))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert backend["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    assert backend["normalizer"] is None
    assert len(tokenizer) == 49152
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]


def test_gemma3_tokenizer_is_sentencepiece_without_a_dummy_prefix() -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_expert_dir("gemma3"))
    assert len(tokenizer) == 262144

    def pieces(text: str) -> list[str]:
        tokens: list[str] = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
        return tokens

    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 2
    assert pieces("a b") == ["a", "▁b"]
    assert pieces("   a") == ["▁▁▁", "a"]
    assert pieces("a\n\n\n\tb") == ["a", "\n\n\n", "\t", "b"]
    assert pieces("123") == ["1", "2", "3"]
    assert pieces("\U0001fae8") in (["\U0001fae8"], ["<0xF0>", "<0x9F>", "<0xAB>", "<0xA8>"])
    assert pieces("\U000e0041") == ["<0xF3>", "<0xA0>", "<0x81>", "<0x81>"]


def test_end_of_text_ids(loaded: tuple[str, Any, Any]) -> None:
    name, model, tokenizer = loaded
    expected = {"smollm2": (2, 1, 2), "gemma3": (1, 2, 0)}[name]
    for source in (model.config, model.generation_config, tokenizer):
        assert (source.eos_token_id, source.bos_token_id, source.pad_token_id) == expected
    assert model.generation_config.do_sample in (None, False)


def test_gemma3_config_matches_the_architecture() -> None:
    config = json.loads((real_expert_dir("gemma3") / "config.json").read_text())
    assert config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert config["rope_parameters"] == {
        "full_attention": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    }
    facts: dict[str, float] = {
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "head_dim": 256,
        "num_attention_heads": 4,
    }
    facts |= {"num_key_value_heads": 1, "num_hidden_layers": 18, "hidden_size": 640, "rms_norm_eps": 1e-6}
    assert {key: config[key] for key in facts} == facts


def test_smollm2_config_matches_the_architecture() -> None:
    config = json.loads((real_expert_dir("smollm2") / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert (config["rope_theta"], config["rms_norm_eps"], config["max_position_embeddings"]) == (
        1e5,
        1e-5,
        8192,
    )


def test_terms_lie_beside_the_model() -> None:
    assert "Apache License" in (real_expert_dir("smollm2") / "LICENSE").read_text()
    assert "Gemma Terms of Use" in (real_expert_dir("gemma3") / "GEMMA_TERMS.html").read_text()
    assert "ai.google.dev/gemma/terms" in (real_expert_dir("gemma3") / "NOTICE").read_text()
