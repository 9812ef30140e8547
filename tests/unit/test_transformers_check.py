"""The checks at load: what they accept, lower the context for, and refuse, in every dtype."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.conftest import TINY_MODELS, tiny_tokenizer
from token_swarm.experts import laws
from token_swarm.experts.loading import ExpertLoadError, dtype_of
from token_swarm.experts.transformers import check, loading, logic_check, shadow
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.experts.transformers.packed_attention import PackedBatch

DTYPES = ("float32", "float16", "bfloat16")
_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
_SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **_IDS}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}

# Architectures that compute in another way from a threshold on: the model, the threshold, and whether packed batches
# follow it.
BEYOND = {
    "window given to the attention": (
        lambda: MistralForCausalLM(MistralConfig(**_SIZES, **_HEADS, sliding_window=24)),
        None,
    ),
    "window in the mask alone": (
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **_SIZES,
                **_HEADS,
                **_EXPERTS,
                shared_expert_intermediate_size=16,
                use_sliding_window=True,
                sliding_window=24,
                max_window_layers=1,
            )
        ),
        "sliding_window = 24",
    ),
    "attention chunks": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(
                **_SIZES,
                **_HEADS,
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=2,
                attention_chunk_size=24,
                floor_scale=30,
            )
        ),
        "attention_chunk_size = 24",
    ),
    "long factors of rotary embeddings": (
        lambda: Phi3ForCausalLM(
            Phi3Config(**_SIZES, **_HEADS, original_max_position_embeddings=32, rope_parameters=_LONG_ROPE)
        ),
        "original_max_position_embeddings = 32",
    ),
    "attention sinks": (
        lambda: GptOssForCausalLM(
            GptOssConfig(**_SIZES, **_HEADS, head_dim=8, num_local_experts=4, sliding_window=24)
        ),
        None,
    ),
}


def saved(model, directory):
    torch.manual_seed(0)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", BEYOND)
def test_beyond_a_threshold_packed_batches_are_right_or_the_context_ends_below_it(tmp_path, caplog, case):
    make, threshold = BEYOND[case]
    directory = saved(make(), tmp_path)
    with caplog.at_level(logging.WARNING, "token_swarm"):
        expert = TransformersExpert("e", directory, dtype="float32", threads=1, max_sequences=4, max_context=100)
    lowered = [record.getMessage() for record in caplog.records if "lowered" in record.getMessage()]
    if threshold is None:
        assert (expert.spec.max_context, lowered) == (100, [])
    else:
        limit = int(threshold.split(" = ")[1]) - 1
        assert expert.spec.max_context == limit
        (line,) = lowered
        assert f"max_context: lowered from 100 to {limit}: from {threshold} tokens on" in line
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = laws.random_tokens(expert, np.random.default_rng(0), min(90, expert.spec.max_context))
    with torch.inference_mode():
        inputs = torch.tensor([expert.numbering.to_model(tokens)])
        expected = plain(input_ids=inputs, use_cache=False).logits[0][:, expert.numbering.columns]
    torch.testing.assert_close(laws.fresh_rows(expert, tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_context_that_ends_below_the_smallest_is_refused(tmp_path):
    directory = saved(
        Phi3ForCausalLM(
            Phi3Config(
                **_SIZES,
                **_HEADS,
                original_max_position_embeddings=8,
                rope_parameters={**_LONG_ROPE, "original_max_position_embeddings": 8},
            )
        ),
        tmp_path,
    )
    with pytest.raises(ExpertLoadError, match=r"from original_max_position_embeddings = 8 tokens on they do not"):
        TransformersExpert("e", directory, dtype="float32", threads=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_sees_later_tokens_is_refused(tmp_path, dtype):
    sizes = {name: value for name, value in {**_SIZES, **_HEADS}.items() if name != "num_key_value_heads"}
    directory = saved(BertLMHeadModel(BertConfig(**sizes)), tmp_path)
    with pytest.raises(ExpertLoadError, match=r"BertLMHeadModel .* it is not causal"):
        TransformersExpert("bert", directory, dtype=dtype, threads=1)


def nothing_seen_before(self, run, first, window):
    return torch.eye(run.count, run.stop - first, dtype=torch.bool)


def window_forgotten(self, run, first, window, mask=PackedBatch.mask):
    return mask(self, run, first, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "mask", "words"),
    [
        ("llama", nothing_seen_before, "LlamaForCausalLM cannot be served in packed batches"),
        ("gemma3", window_forgotten, "from sliding_window = 8 tokens on they do not compute what it does"),
    ],
)
def test_a_wrong_mask_is_caught_in_every_dtype(tiny_model_dir, monkeypatch, name, mask, words, dtype):
    monkeypatch.setattr(PackedBatch, "mask", mask)
    with pytest.raises(ExpertLoadError, match=words):
        TransformersExpert("wrong", tiny_model_dir(name), dtype=dtype, threads=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_weights_are_caught_in_every_dtype(tiny_model_dir, monkeypatch, dtype):
    """The small copy knows nothing of the weights: the model's own forward does."""
    forward = TransformersExpert._forward

    def louder(self, runs, tokens, wanted, logits):
        forward(self, runs, tokens, wanted, logits)
        logits *= 1.05

    monkeypatch.setattr(TransformersExpert, "_forward", louder)
    with pytest.raises(ExpertLoadError, match=rf"of their spread, .* is what rounding in {dtype} explains"):
        TransformersExpert("wrong", tiny_model_dir("llama"), dtype=dtype, threads=1)


def test_a_difference_in_float32_is_held_against_the_models_own(tiny_model_dir, monkeypatch):
    """It is measured only then, with the model loaded once more."""
    monkeypatch.setitem(check._LEAST, torch.float32, 1e-9)
    measured = []
    measure = check.PlainForward.measure_floor

    def counted(plain, model):
        measure(plain, model)
        measured.append(plain.floor)

    monkeypatch.setattr(check.PlainForward, "measure_floor", counted)
    expert = TransformersExpert("e", tiny_model_dir("gpt2"), dtype="float32", threads=1, max_sequences=4)
    assert expert.stats().sequences == 0
    assert len(measured) == 1
    assert 1e-8 < measured[0] < 1e-5


@pytest.fixture
def overflowing(tmp_path, tiny_model_dir):
    """A checkpoint in float16 that is right in float32 and overflows in its own dtype."""
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    with torch.no_grad():
        # The products inside of the feed-forward layers grow beyond 65,504, the norms behind them do not mind.
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight *= 1000
    return saved(model.half(), tmp_path)


def test_logits_that_are_not_finite_are_refused_by_name(overflowing):
    with pytest.raises(ExpertLoadError, match="not finite in float16 on ordinary text; use dtype: float32 or bfloat16"):
        TransformersExpert("e", overflowing, dtype="float16", threads=1)
    assert TransformersExpert("e", overflowing, threads=1).spec.dtype == torch.float32


def test_auto_takes_float32_where_the_checkpoints_own_dtype_overflows(overflowing, monkeypatch, caplog):
    """On a GPU `auto` is the checkpoint's dtype: simulated here, for the fall-back does not depend on the device."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(loading, "dtype_of", lambda dtype, device: dtype_of(dtype, gpu))
    expert = TransformersExpert("e", overflowing, threads=1)
    assert expert.spec.dtype == torch.float32
    (line,) = [record.getMessage() for record in caplog.records if "float32" in record.getMessage()]
    assert line.startswith("expert e is served in float32: model: LlamaForCausalLM has logits that are not finite")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_float32_on_every_cpu(tiny_model_dir, tmp_path, monkeypatch, native):
    """Also where the processor computes bfloat16 natively, and whatever the checkpoint is in."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native, "amx_bf16": native})
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir("llama"), dtype=torch.float32)
    directory = saved(model.bfloat16(), tmp_path)
    assert TransformersExpert("e", directory, threads=1).spec.dtype == torch.float32
    assert TransformersExpert("e", directory, dtype="bfloat16", threads=1).spec.dtype == torch.bfloat16


def test_a_model_of_which_no_copy_can_be_made_is_checked_on_text(tiny_model_dir, monkeypatch, caplog):
    def refused(model, limits):
        raise shadow.ShadowError("ValueError: sizes")

    monkeypatch.setattr(logic_check, "shadow_model", refused)
    expert = TransformersExpert("e", tiny_model_dir("gemma3"), dtype="float32", threads=1, max_context=80)
    assert expert.spec.max_context == 80
    assert "Gemma3ForCausalLM is checked on a short text alone" in caplog.text


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_small_copy_is_small_and_has_every_threshold(tiny_model_dir, name):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(name))
    limits = dict.fromkeys(shadow.thresholds(model.config), 12)
    state = torch.random.get_rng_state()
    copy = shadow.shadow_model(model, limits)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(copy) is type(model)
    assert sum(each.numel() for each in copy.parameters()) < 1_000_000
    assert set(shadow.thresholds(copy.config).values()) <= {12}
    assert set(limits) == ({"sliding_window"} if name.startswith("gemma") else set())
