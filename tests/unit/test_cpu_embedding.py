"""A packed model holds its weights once, in bfloat16, and its embedding gives the rows that it gave before."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from token_swarm.experts.transformers.cpu_embedding import PackedEmbedding, pack_embedding
from token_swarm.experts.transformers.cpu_linear import PackedLinear, pack_linears
from token_swarm.experts.transformers.packed_model import pack, weight_bytes

SIZES = {"vocab_size": 448, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(*, tied: bool, stored: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied, initializer_range=0.2)
    return LlamaForCausalLM(config).to(stored).float().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reordered", [True, False])
def test_rows_are_those_of_the_embedding_and_held_once(tied, reordered):
    model = llama(tied=tied)
    stored = sum(each.numel() * 2 for each in model.parameters())
    before = model.get_input_embeddings().weight.detach().clone()
    pack(model, torch.randperm(448) if reordered else torch.arange(448))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    ids = torch.tensor([[0, 399, 7, 7]])
    assert torch.equal(embedding(ids), before[ids])
    assert torch.equal(embedding.weight, before)
    assert model.dtype == torch.float32
    # Norms, biases of panels and positions are float32.
    assert weight_bytes(model) < 1.1 * stored


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_an_embedding_that_scales_scales_on(tiny_model_dir, name):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(name), dtype=torch.float32).bfloat16().float().eval()
    ids = torch.arange(50)[None]
    expected = model.get_input_embeddings()(ids)
    pack_linears(model, 1, model.get_output_embeddings())
    pack_embedding(model, tied=True)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert torch.equal(model.get_input_embeddings()(ids), expected)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1.0


@pytest.mark.parametrize("kind", ["of another class", "not kept by bfloat16", "of limited norm"])
def test_other_embeddings_stay(kind):
    model = llama(tied=False, stored=torch.float32 if kind.startswith("not") else torch.bfloat16)
    embedding = model.get_input_embeddings()
    if kind == "of another class":
        embedding.__class__ = Shifted
    elif kind == "of limited norm":
        embedding.max_norm = 1.0
    pack_embedding(model, tied=False)
    assert model.get_input_embeddings() is embedding
