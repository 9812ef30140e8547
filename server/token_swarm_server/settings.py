"""What can be configured: the keys, their defaults, and what each may hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW
from token_swarm.particle import Mixture, Rule

ENV_PREFIX = "TOKEN_SWARM_"
ENV_DELIMITER = "__"
EXPERT_NAME = r"[a-z0-9][a-z0-9_.-]*"
DEMO_SCHEME = "demo:"
PUBLIC_MESSAGE_BYTES = 4 * 2**20
"""Cap of a message between the public service and its clients."""
DEFAULT_LISTEN = "127.0.0.1:50061"
# A hub id is "name" or "owner/name"; anything else is meant as a directory.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def _listen_address(value: str) -> str:
    """Refuse an address that nobody could listen on, and one that other machines could reach."""
    allowed = (
        f"must be host:port (host one of {', '.join(_LOOPBACK)}; port 0: any free one) or unix:/absolute/path"
    )
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path.startswith("/") or len(os.fsencode(path)) > 107:
            raise ValueError(f"{allowed} of less than 108 bytes")
        return value
    host, _, port = value.rpartition(":")
    if host not in _LOOPBACK or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        # Nothing is authenticated yet, so the server stays on this machine.
        raise ValueError(allowed)
    return value


class ExpertSettings(BaseModel):
    """One expert: a causal language model in a process of its own."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1)] | None = None
    """Directory or Hugging Face id; `demo:smollm2` and `demo:gemma3` are fetched when missing."""
    backend: Literal["transformers"] = "transformers"
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    """Default: the cores of this machine divided by the number of experts started here, at least 1."""
    max_sequences: Annotated[int, Field(ge=1)] = 16
    max_context: Annotated[int, Field(ge=2)] = 2048
    python: Path | None = None
    """Interpreter of another virtual environment that has token-swarm installed; default: this one."""
    prefill_chunk: Annotated[int, Field(ge=1)] | None = None
    """Most prompt tokens that one step takes while other texts run: what bounds their stall. Default: 32 on a CPU,
    512 elsewhere."""
    step_seconds: Annotated[float, Field(gt=0)] = 60.0
    """An expert that takes longer over one step counts as hung and is started again."""
    address: Annotated[str, Field(min_length=1)] | None = None
    """gRPC address of an expert that runs already; it is used instead of starting one."""

    @model_validator(mode="after")
    def _startable_or_running(self) -> ExpertSettings:
        if self.model is None and self.address is None:
            raise ValueError("give model (to start the expert) or address (of one that runs)")
        return self


class CoordinatorSettings(BaseModel):
    """The process that mixes the experts and serves text."""

    model_config = ConfigDict(extra="forbid")

    listen: Annotated[str, AfterValidator(_listen_address)] = DEFAULT_LISTEN
    particles: Path | None = None
    """Folder of particle JSON files that requests may name."""
    rule: Literal["linear", "log-linear"] = "log-linear"
    weights: dict[str, float] = Field(default_factory=dict)
    """Mixture of a request that names none; empty: uniform over all experts."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = DEFAULT_EPSILON
    window: Annotated[int, Field(ge=1)] | None = DEFAULT_WINDOW
    lanes_per_expert: Annotated[int, Field(ge=1)] = 2
    max_queue: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait for KV; the next one is refused."""
    max_queue_bytes: Annotated[int, Field(ge=0)] = 16 * 2**20
    """Bytes of prompt that may wait for KV."""
    max_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest life of a request, whatever its own deadline."""
    wait_seconds: Annotated[float, Field(ge=0)] = 120.0
    """How long a request waits for an expert that is down before it fails."""
    quorum: Annotated[int, Field(ge=1)] | None = None
    """Experts that must answer for health checks to say SERVING; default: all of them."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Given to running texts when the server is told to stop."""


class Settings(BaseSettings):
    """Everything that `token-swarm serve` can be told. Made by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_parse_none_str="null",
        extra="forbid",
    )

    experts: dict[Annotated[str, Field(pattern=f"^{EXPERT_NAME}$")], ExpertSettings] = Field(min_length=1)
    coordinator: CoordinatorSettings = CoordinatorSettings()
    cache: Path = Path(".cache")
    """Converted models, vocabularies and logs; relative to the current directory."""
    pin_cores: bool = False
    """Give every local expert cores of its own where there are enough."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order of precedence, strongest first; the file comes in by `load_settings`."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings

    @model_validator(mode="after")
    def _weights_name_experts(self) -> Settings:
        if not self.coordinator.weights:
            return self
        for name in self.coordinator.weights:
            if name not in self.experts:
                known = ", ".join(sorted(self.experts))
                raise ValueError(f"coordinator.weights.{name}: there is no such expert; known: {known}")
        try:
            Mixture(self.coordinator.weights, Rule(self.coordinator.rule))
        except ValueError as error:
            raise ValueError(f"coordinator.{error}") from error
        return self

    def local_experts(self) -> dict[str, ExpertSettings]:
        """The experts that are started here, in the order of the configuration."""
        return {name: expert for name, expert in self.experts.items() if expert.address is None}
