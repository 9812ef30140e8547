"""Fixtures shared by every test: tiny real models, and the converted demo experts."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from token_swarm.experts.transformers.expert import TransformersExpert

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores.
    torch.set_num_threads(1)

EXPERTS = Path(__file__).parents[1] / ".cache" / "experts"

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b\n",
    "In 1984, there were 12 monkeys and 101 dalmatians.",
    "naïve café, Ελλάδα, 東京 🙂",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

# Learned in a random model, attention and positions hardly matter: larger weights make their mistakes visible.
_SCALE = {"initializer_range": 0.2}
_SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

TINY_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, **_HEADS, **_SCALE)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SIZES,
            **_HEADS,
            **_SCALE,
            **_GEMMA,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SIZES, **_HEADS, **_SCALE, **_GEMMA, attn_logit_softcapping=2.0)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, **_HEADS, **_SCALE, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=400,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=96,
            bos_token_id=0,
            eos_token_id=1,
            **_SCALE,
        )
    ),
}

HALF_PRECISION = {"gemma3", "qwen2"}
"""Models whose weights float16 holds, as it does those of most published checkpoints."""


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a BOS, an end-of-text token and the marks of a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|turn|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=special[2:],
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tiny_model(name: str, directory: Path) -> Path:
    """A random float32 model of architecture `name` with its tokenizer, in `directory`."""
    torch.manual_seed(0)
    model = TINY_MODELS[name]()
    if name in HALF_PRECISION:
        model.half().float()
    tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_small_tokenizer(directory: Path, vocabulary: int) -> int:
    """Byte-level BPE of at most `vocabulary` tokens with an end-of-text token, id 0; returns how many it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat and the rat ate the hat"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return tokenizer.get_vocab_size()


def save_small_llama(directory: Path, vocabulary: int) -> Path:
    """A causal language model of a few kilobytes; another size of the vocabulary gives other tokens.

    Its weights depend on the name of the directory: the same at every run, and others for another expert.
    """
    torch.manual_seed(zlib.crc32(directory.name.encode()))
    config = LlamaConfig(
        vocab_size=save_small_tokenizer(directory, vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def real_expert_dir(name: str) -> Path:
    """The directory of a converted demo expert; skips the test, with the reason, where it is missing."""
    directory = EXPERTS / name
    if not (directory / "token_swarm.json").is_file():
        pytest.skip(f"the demo expert {name} is not in {directory.relative_to(EXPERTS.parents[1])}: make experts")
    return directory


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """What a command in this process has its log written to ends with the test: that stream is closed."""
    root = logging.getLogger()
    before = set(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("token_swarm", "token_swarm_server")}
    yield
    for handler in set(root.handlers) - before:
        root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name in TINY_MODELS -> a model directory, made once per session."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return directory


@pytest.fixture(scope="session")
def loaded_experts() -> dict[tuple[str, str], TransformersExpert]:
    """(name, dtype) -> an expert that tests of this process share."""
    return {}


@pytest.fixture(autouse=True)
def released_sequences(loaded_experts: dict[tuple[str, str], TransformersExpert]) -> Iterator[None]:
    """A test that fails half-way leaves its sequences open: those after it would fail as well."""
    yield
    for expert in loaded_experts.values():
        expert._release_all()


@pytest.fixture(scope="session")
def tiny_expert(
    tiny_model_dir: Callable[[str], Path], loaded_experts: dict[tuple[str, str], TransformersExpert]
) -> Callable[..., TransformersExpert]:
    """(name in TINY_MODELS, dtype) -> a small expert on it, loaded once per session."""

    def expert(name: str, dtype: str = "float32") -> TransformersExpert:
        if (name, dtype) not in loaded_experts:
            loaded_experts[name, dtype] = TransformersExpert(
                name, tiny_model_dir(name), dtype=dtype, threads=1, max_sequences=6, max_context=80
            )
        return loaded_experts[name, dtype]

    return expert


@pytest.fixture(scope="session")
def real_expert(loaded_experts: dict[tuple[str, str], TransformersExpert]) -> Callable[[str], TransformersExpert]:
    """A demo expert's name -> that expert in float32, loaded once per session."""

    def expert(name: str) -> TransformersExpert:
        key = (f"real {name}", "float32")
        if key not in loaded_experts:
            loaded_experts[key] = TransformersExpert(
                name, real_expert_dir(name), dtype="float32", threads=1, max_sequences=9, max_context=800
            )
        return loaded_experts[key]

    return expert
