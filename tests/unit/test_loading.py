"""A directory that is no model, or a damaged one, is explained in one sentence that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.transformers.expert import TransformersExpert
from token_swarm.experts.transformers.loading import cache_argument


@pytest.fixture
def model(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "model"))


def refused(model: Path) -> str:
    with pytest.raises(ExpertLoadError) as caught:
        TransformersExpert("bad", model)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("size", [0, 4, 2000, 30000])
def test_weights_that_were_not_copied_in_full_are_damaged(model, size):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"{weights} is damaged or was not copied in full" in refused(model)


def test_weights_that_are_something_else_are_damaged(model):
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    assert "model.safetensors is damaged" in refused(model)


def test_the_damaged_one_of_several_files_is_named(model):
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, model / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    broken = model / "model-00002-of-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:500])
    assert f"{broken} is damaged" in refused(model)


def test_weights_that_are_missing_are_not_made_up(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of LlamaForCausalLM, such as model.layers.1.mlp.up_proj.weight" in refused(model)


def test_a_lora_adapter_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert f"{tmp_path} is a LoRA adapter, not a model" in refused(tmp_path)


def test_what_lacks_is_named(model, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "holds no model: there is no config.json in it" in refused(tmp_path / "nothing")
    (tmp_path / "nothing" / "a.gguf").write_bytes(b"GGUF")
    assert "holds a GGUF file" in refused(tmp_path / "nothing")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer: there is no tokenizer.json in it" in refused(model)


def test_a_tokenizer_that_is_damaged_is_named(model):
    (model / "tokenizer.json").write_text("{")
    assert f"the tokenizer of {model} cannot be loaded: " in refused(model)


def test_the_cache_is_called_what_the_model_calls_it():
    class Newer:
        def forward(self, input_ids=None, cache=None, use_cache=None):
            raise NotImplementedError

    class Older:
        def forward(self, input_ids=None, past_key_values=None, use_cache=None):
            raise NotImplementedError

    assert cache_argument(Newer()) == "cache"
    assert cache_argument(Older()) == "past_key_values"
