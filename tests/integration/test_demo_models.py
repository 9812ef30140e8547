"""Facts about the converted demo experts, read back the ordinary way."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open
from token_swarm_server.assets.demo_conversion import tokens_sha256
from token_swarm_server.assets.demo_table import DEMO_EXPERTS, DEMO_PAIR, DemoExpert
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from tests.conftest import real_expert_dir

NAMES = ("smollm2", "qwen2.5-coder", "gemma3")

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
        "qwen2.5-coder": ("The capital of France is", " Paris"),
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


def test_chats_of_qwen_have_the_published_form() -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_expert_dir("qwen2.5-coder"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    assert tokens[:2] == ["<|im_start|>", "system"]
    assert tokens[-3:] == ["<|im_start|>", "assistant", "Ċ"]


def test_qwen_tokenizer_is_the_published_one() -> None:
    directory = real_expert_dir("qwen2.5-coder")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # transformers' own class brings the published steps around any vocabulary.
    published = json.loads(Qwen2Tokenizer(vocab=backend["model"]["vocab"], merges=[]).backend_tokenizer.to_str())
    for step in ("normalizer", "pre_tokenizer"):
        assert backend[step] == published[step]
    assert backend["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # 151,643 tokens and 22 added ones; the model's 151,936 logits have 271 more that no text holds.
    assert len(tokenizer) == 151_665
    assert AutoConfig.from_pretrained(directory).vocab_size == 151_936
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("it's 2024\n\n  def"))
    assert pieces == ["it", "'s", "Ġ", "2", "0", "2", "4", "ĊĊ", "Ġ", "Ġdef"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


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
    end, start, pad = {"smollm2": (2, 1, 2), "qwen2.5-coder": (151645, 151643, 151643), "gemma3": (1, 2, 0)}[name]
    for source in (model.config, model.generation_config, tokenizer):
        # Qwen's published generation config has <|endoftext|> end a text as well.
        both = name == "qwen2.5-coder" and source is model.generation_config
        assert source.eos_token_id == ([end, 151643] if both else end)
        assert (source.bos_token_id, source.pad_token_id) == (start, pad)
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


def test_qwen_config_matches_the_architecture() -> None:
    config = json.loads((real_expert_dir("qwen2.5-coder") / "config.json").read_text())
    facts: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "head_dim": 64}
    facts |= {"num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    assert {key: config[key] for key in facts} == facts


def test_terms_lie_beside_the_model() -> None:
    for name in ("smollm2", "qwen2.5-coder"):
        assert "Apache License" in (real_expert_dir(name) / "LICENSE").read_text()
    assert "Modified: converted" in (real_expert_dir("qwen2.5-coder") / "NOTICE").read_text()
    assert "Gemma Terms of Use" in (real_expert_dir("gemma3") / "GEMMA_TERMS.html").read_text()
    assert "ai.google.dev/gemma/terms" in (real_expert_dir("gemma3") / "NOTICE").read_text()


def test_the_demo_shows_both_alone_and_as_one() -> None:
    real_expert_dir("qwen2.5-coder")
    command = [sys.executable, "-m", "token_swarm_server.cli", "demo", "--max-bytes", "60"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300, check=True)
    told = json.loads(done.stdout)
    assert told["alone"].keys() == set(DEMO_PAIR) == told["weights"].keys()
    ensemble = told["ensemble"]
    assert ensemble["text"].startswith("In Python, a list and a tuple are")
    assert "".join(word["text"] for word in ensemble["words"]) == ensemble["text"]
    assert {word["carried"] for word in ensemble["words"]} <= {None, *DEMO_PAIR}
    assert {use["expert"] for use in ensemble["experts"]} == set(DEMO_PAIR)
    assert ensemble["without_chat_template"] == []
    for bits in told["bits_per_byte"].values():
        # What the product is for: better than the better one of the two.
        assert bits["ensemble"] < min(bits["experts"].values())
    assert ensemble["ms_per_byte"] > 0
