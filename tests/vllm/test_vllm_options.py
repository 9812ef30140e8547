"""What the configuration of a vLLM expert may hold. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from token_swarm_server.config.loading import ConfigError, load_settings
from typer.testing import CliRunner

from token_swarm.experts.loading import ExpertLoadError
from token_swarm.experts.registry import parse_options
from token_swarm.experts.vllm import engine
from token_swarm.experts.vllm.options import OPTIONS, check_options, engine_arguments


def test_every_option_takes_a_sensible_value() -> None:
    options = parse_options(
        [
            "block_size=32",
            "enforce_eager=True",
            "gpu_memory_utilization=0.5",
            "kv_cache_dtype=fp8",
            "kv_cache_memory=1000000",
            "load_format=safetensors",
            "max_num_batched_tokens=512",
            "quantization=awq",
            "revision=main",
            "tensor_parallel_size=2",
            "trust_remote_code=false",
        ]
    )
    assert options.keys() == OPTIONS.keys()
    check_options(options)
    arguments = engine_arguments(options)
    assert arguments["kv_cache_memory_bytes"] == 1_000_000
    assert arguments["enforce_eager"] is True
    assert arguments["trust_remote_code"] is False


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("max_model_len=5", r"engine.max_model_len: unknown; allowed: block_size, enforce_eager"),
        ("enforce_eager=1", r"engine.enforce_eager: 1 is not allowed, it must be true or false"),
        ("gpu_memory_utilization=1.5", r"engine.gpu_memory_utilization: 1.5 is not allowed, it must be above 0"),
        ("tensor_parallel_size=0", r"engine.tensor_parallel_size: 0 is not allowed, it must be a whole number"),
        ("quantization=3", r"engine.quantization: 3 is not allowed, it must be a name"),
        ("block_size", r"engine: 'block_size' is not KEY=VALUE"),
    ],
)
def test_a_bad_option_is_refused_by_name(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(parse_options([pair]))


def test_the_configuration_reaches_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_SWARM_EXPERTS__A__ENGINE__BLOCK_SIZE", "64")
    settings = load_settings(experts={"a": {"model": "x/y", "backend": "vllm", "engine": {"quantization": "awq"}}})
    assert settings.experts["a"].engine == {"quantization": "awq", "block_size": 64}


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"backend": "vllm", "engine": {"dtype": "auto"}}, r"experts.a: engine.dtype: unknown; allowed: block_size"),
        ({"engine": {"block_size": 32}}, r"experts.a: engine: the transformers backend takes no options"),
        ({"backend": "llama.cpp"}, r"experts.a: backend: 'llama.cpp' is not one of 'transformers', 'vllm'$"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path: Path, expert: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_settings(experts={"a": {"model": "x/y", **expert}})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "vllm", "--engine", "dtype=auto"], "error: --engine.dtype: unknown; allowed: block_size"),
        (["--engine", "block_size=32"], "error: --engine: the transformers backend takes no options of its own"),
        (["--backend", "vllm", "--engine", "nonsense"], "error: --engine: 'nonsense' is not KEY=VALUE"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], message: str) -> None:
    from token_swarm_server.cli import app

    result = CliRunner().invoke(app, ["expert", "a", "--model", "x/y", *flags])
    assert result.exit_code == 2
    assert message in result.output


def test_the_wrong_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> str:
        raise engine.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "metadata", SimpleNamespace(version=without, PackageNotFoundError=Exception))
        with pytest.raises(ExpertLoadError, match="backend: vllm is not installed for this interpreter; install it"):
            engine.check_installed()
    for version, known in [("0.32.0", True), ("0.32.1+cpu", True), ("0.33.0", False), ("0.3.2", False)]:
        monkeypatch.setattr(engine.metadata, "version", lambda name, version=version: version)
        if known:
            assert engine.check_installed() == version
        else:
            with pytest.raises(ExpertLoadError, match=f"backend: vllm {version} is installed, 0.32 is needed"):
                engine.check_installed()
