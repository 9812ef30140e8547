"""The library's face: its names, how light importing is, and the documented example."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import token_swarm
from tests.documented import examples
from tests.laws.ensembles import LONG, NESTED, toys
from token_swarm import DecodeRequest, LocalEnsemble, Mixture, Particle, Sampling
from token_swarm.errors import FingerprintMismatch, UnknownName
from token_swarm.experts.loading import ExpertLoadError

LAZY = ["token_swarm", *(f"token_swarm.{name}" for name in ("experts", "mixing", "decoding", "search"))]


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Sampler1'"):
        _ = module.Sampler1


@pytest.mark.parametrize("package", LAZY)
def test_importing_a_package_stays_light(package: str) -> None:
    heavy = ("torch", "numpy", "transformers", "grpc", "pydantic")
    code = f"import sys, {package}; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


def test_the_documented_example_runs(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (example,) = examples("python.md")
    assert len(example.splitlines()) <= 16
    (tmp_path / ".cache" / "experts").mkdir(parents=True)
    for name, model in (("smollm2", "llama"), ("qwen2.5-coder", "qwen2")):
        (tmp_path / ".cache" / "experts" / name).symlink_to(tiny_model_dir(model))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/python.md", "exec"), {})
    said = capsys.readouterr().out
    assert "max_bytes" in said or "end_of_text" in said
    assert "'smollm2': -" in said


def test_the_defaults_are_a_uniform_mixture_and_a_plain_request() -> None:
    local = LocalEnsemble(toys([NESTED, LONG], max_context=40))
    uniform = Mixture({"e0": 0.5, "e1": 0.5})
    assert local.generate("cab") == local.generate("cab", uniform, DecodeRequest())
    assert local.score("cab", "abc").log_prob == local.score("cab", "abc", uniform).log_prob
    request = DecodeRequest(sampling=Sampling(temperature=0.0), max_bytes=20)
    assert "".join(local.stream("cab", request=request)) == local.generate("cab", request=request)[0]


def test_a_particle_is_a_mixture_with_a_name() -> None:
    local = LocalEnsemble(toys([NESTED, LONG], max_context=40))
    mixture, request = Mixture({"e0": 0.2, "e1": 0.8}), DecodeRequest(max_bytes=10)
    marks = {name: spec.vocabulary.fingerprint for name, spec in local.ensemble.specs.items()}
    particle = Particle("mine", mixture, marks)
    assert local.generate("cab", particle, request) == local.generate("cab", mixture, request)
    with pytest.raises(FingerprintMismatch, match="'mine'"):
        local.stream("cab", Particle("mine", mixture, marks | {"e0": "0" * 64}))
    with pytest.raises(UnknownName, match="no expert named 'e7'"):
        local.score("cab", "a", Mixture({"e7": 1.0}))


def test_what_was_loaded_is_freed_where_a_model_is_missing(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from token_swarm.experts.transformers.expert import TransformersExpert

    closed: list[str] = []
    monkeypatch.setattr(TransformersExpert, "close", lambda self: closed.append(self.spec.name))
    with pytest.raises(ExpertLoadError, match="is not a directory"):
        LocalEnsemble.load({"a": tiny_model_dir("llama"), "b": tmp_path / "none"}, max_context=80)
    assert closed == ["a"]
    with pytest.raises(UnknownName, match="no backend named 'llama'"):
        LocalEnsemble.load({"a": tiny_model_dir("llama")}, backend="llama")


def test_the_face_is_small() -> None:
    assert set(token_swarm.__all__) == {"LocalEnsemble", "Mixture", "Particle", "Rule", "DecodeRequest", "Sampling"}
