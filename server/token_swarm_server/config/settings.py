"""What can be configured: the keys, their defaults, and what each may hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from token_swarm.experts.registry import BACKENDS, DEFAULT_BACKEND, check_backend, parse_value
from token_swarm.mixing.defaults import DEFAULT_EPSILON, DEFAULT_WINDOW, MOST_DRAFT_TOKENS
from token_swarm.particle import Mixture, Rule
from token_swarm.ranges import EPSILON, SECONDS, WINDOW
from token_swarm.rules import RULES
from token_swarm_server.config.addresses import check_target, parse_listen
from token_swarm_server.config.places import default_cache

ENV_PREFIX = "TOKEN_SWARM_"
ENV_DELIMITER = "__"
# Not keys: what the commands that call a server read their --token-file and --tls-... from, and the cap on the kernels.
OTHER_VARIABLES = tuple(
    ENV_PREFIX + name for name in ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERTIFICATE", "TLS_KEY", "CPU_LEVEL")
)
EXPERT_NAME = r"[a-z0-9][a-z0-9_.-]*"
DEMO_SCHEME = "demo:"
PUBLIC_MESSAGE_BYTES = 4 * 2**20
"""Cap of a message between the public service and its clients."""
DEFAULT_LISTEN = "127.0.0.1:50061"
# A hub id is "name" or "owner/name"; anything else is meant as a directory.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


_CHUNK_ON_CPU = 8
_CHUNK_ELSEWHERE = 512


def _listen_address(value: str) -> str:
    parse_listen(value)
    return value


def _listen_tcp(value: str) -> str:
    if parse_listen(value).path is not None:
        raise ValueError("must be host:port; HTTP is not served on a UNIX socket")
    return value


def _read_text(value: object) -> object:
    """The environment has nothing but text."""
    return parse_value(value) if isinstance(value, str) else value


def _rule_name(value: str) -> str:
    if value not in RULES.names():
        raise ValueError(f"must be one of {', '.join(map(repr, RULES.names()))}")
    return value


def _otlp_endpoint(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+", value):
        raise ValueError("must be http://host:port or https://host:port")
    return value


class ServerTls(BaseModel):
    """How a server proves who it is, and whom it lets in."""

    model_config = ConfigDict(extra="forbid")

    certificate: Path
    """PEM file: the server's certificate, then the intermediate ones."""
    key: Path
    """PEM file: its private key, not encrypted."""
    client_ca: Path | None = None
    """PEM file: only clients with a certificate from one of these authorities can connect (mutual TLS)."""
    client_names: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Of these, only those with one of these names in their certificate may call; empty: all of them."""

    @model_validator(mode="after")
    def _names_are_checked(self) -> ServerTls:
        if self.client_names and self.client_ca is None:
            raise ValueError("client_names: needs client_ca, without which clients show no certificate")
        return self


class ClientTls(BaseModel):
    """How a client knows the server, and proves who it is itself. Without any key: as browsers do."""

    model_config = ConfigDict(extra="forbid")

    ca: Path | None = None
    """PEM file: authorities that may have signed the server's certificate; default: the public ones that gRPC has."""
    certificate: Path | None = None
    """PEM file: the certificate to show to a server that asks for one (mutual TLS)."""
    key: Path | None = None
    """PEM file: its private key, not encrypted."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> ClientTls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("give certificate and key, or neither")
        return self


def exposure_problem(listen: str, *, tls: ServerTls | None, tokens: bool, allow_insecure: bool) -> str | None:
    """Why a server must not listen at `listen` (as `parse_listen` takes it), or None.

    What other machines can reach must be encrypted, and must ask callers who they are.
    """
    if allow_insecure or not parse_listen(listen).public:
        return None
    problems = []
    if tls is None:
        problems.append("is not encrypted")
    if not tokens and (tls is None or tls.client_ca is None):
        problems.append("lets everybody call")
    return f"{listen} can be reached from other machines, but {' and '.join(problems)}" if problems else None


class ExpertSettings(BaseModel):
    """One expert: a causal language model in a process of its own."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1)] | None = None
    """Directory or Hugging Face id; `demo:smollm2`, `demo:qwen2.5-coder` and `demo:gemma3` are fetched when missing."""
    backend: str = DEFAULT_BACKEND
    """`transformers`, `vllm`, or one that another distribution adds (docs/extending.md)."""
    engine: dict[str, Annotated[bool | int | float | str, BeforeValidator(_read_text)]] = Field(default_factory=dict)
    """Options of the backend's own; docs/vllm.md lists those of vllm."""
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    """Default: the cores of this machine divided by the number of experts started here, at least 1."""
    max_sequences: Annotated[int, Field(ge=1)] = 16
    max_context: Annotated[int, Field(ge=2)] = 2048
    python: Path | None = None
    """Interpreter of another virtual environment that has token-swarm installed; default: this one."""
    prefill_chunk: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens that one step takes for each prompt that waits beside a text being written: what bounds that
    text's stall. A step takes this much at least, 16 times as much at most. Default: 8 on a CPU, 512 elsewhere."""
    step_seconds: Annotated[float, Field(gt=0)] = 60.0
    """An expert that takes longer over one step counts as hung and is started again."""
    address: Annotated[str, AfterValidator(check_target)] | None = None
    """gRPC address of an expert that runs already; it is used instead of starting one."""
    tls: ClientTls | None = None
    """How to reach that expert; default: without encryption."""

    @property
    def chunk(self) -> int:
        """`prefill_chunk`, or its default."""
        return self.prefill_chunk or (_CHUNK_ON_CPU if self.device == "cpu" else _CHUNK_ELSEWHERE)

    def backend_options(self) -> dict[str, Any]:
        """What `load_expert` is told beside names and the model."""
        return self.model_dump(include={"device", "dtype", "threads", "max_sequences", "max_context", "engine"})

    @model_validator(mode="after")
    def _startable_or_running(self) -> ExpertSettings:
        if self.model is None and self.address is None:
            raise ValueError("give model (to start the expert) or address (of one that runs)")
        if self.tls is not None and self.address is None:
            raise ValueError("tls: is for an expert with an address; one that is started here has a private socket")
        if self.python is None or BACKENDS.is_built_in(self.backend):
            # Another interpreter may have backends that this one does not have; its own process says so.
            check_backend(self.backend, self.engine)
        return self


class MetricsSettings(BaseModel):
    """Where Prometheus may ask for metrics, over plain HTTP and without a password; they hold no text."""

    model_config = ConfigDict(extra="forbid")

    listen: Annotated[str, AfterValidator(_listen_tcp)] | None = None
    """host:port; default: nowhere."""
    allow_remote: bool = False
    """Listen where other machines can reach it."""

    @model_validator(mode="after")
    def _strangers_stay_out(self) -> MetricsSettings:
        if self.listen is not None and parse_listen(self.listen).public and not self.allow_remote:
            raise ValueError(
                f"listen: {self.listen} can be reached from other machines, and everybody may ask; listen on 127.0.0.1 "
                "or set coordinator.metrics.allow_remote"
            )
        return self


class TracingSettings(BaseModel):
    """Where OpenTelemetry traces of requests go; needs `pip install token-swarm[tracing]`. They hold no text."""

    model_config = ConfigDict(extra="forbid")

    endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = None
    """OTLP over gRPC, http://host:port or, encrypted, https://host:port; default: nowhere."""
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of traces to keep, of those that the caller has not decided about."""
    service_name: Annotated[str, Field(min_length=1)] = "token-swarm"


class CoordinatorSettings(BaseModel):
    """The process that mixes the experts and serves text."""

    model_config = ConfigDict(extra="forbid")

    listen: Annotated[str, AfterValidator(_listen_address)] = DEFAULT_LISTEN
    tls: ServerTls | None = None
    """Encryption of the public port; default: none."""
    tokens: Path | None = None
    """File of `token-swarm tokens`: every call needs one of its bearer tokens; default: none is asked for."""
    allow_insecure: bool = False
    """Listen where other machines can reach the server, even without encryption or without knowing who calls."""
    particles: Path | None = None
    """Folder of particle JSON files that requests may name."""
    rule: Annotated[str, AfterValidator(_rule_name)] = "log-linear"
    """`linear`, `log-linear`, or one that another distribution adds (docs/extending.md)."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Mixture of a request that names none; empty: uniform over all experts."""
    epsilon: Annotated[float, Field(ge=EPSILON.low, lt=EPSILON.high)] = DEFAULT_EPSILON
    window: Annotated[int, Field(ge=WINDOW.low, le=WINDOW.high)] | None = DEFAULT_WINDOW
    lanes_per_expert: Annotated[int, Field(ge=1)] = 2
    draft_tokens: Annotated[int, Field(ge=0, le=MOST_DRAFT_TOKENS)] = 4
    """Most tokens that an expert computes beyond what a text needs, of a request that does not say; 0: none."""
    draft_rows: Annotated[int, Field(ge=1)] = 6
    """Tokens that a step of an expert takes without taking longer; drafts of the running texts share them."""
    mixing_threads: Annotated[int, Field(ge=1)] | None = None
    """Texts that are mixed at the same time; default: one for each core that the coordinator may use, at most 8."""
    max_queue: Annotated[int, Field(ge=0)] = 64
    """Requests that may wait for KV; the next one is refused."""
    max_queue_bytes: Annotated[int, Field(ge=0)] = 16 * 2**20
    """Bytes of prompt that may wait for KV."""
    max_seconds: Annotated[float, Field(gt=SECONDS.low, le=SECONDS.high)] = 600.0
    """Longest life of a request, whatever its own deadline."""
    wait_seconds: Annotated[float, Field(ge=0)] = 120.0
    """How long a request waits for an expert that is down before it fails."""
    quorum: Annotated[int, Field(ge=1)] | None = None
    """Experts that must answer for health checks to say SERVING; default: all of them."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Given to running texts when the server is told to stop."""
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()


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
    cache: Path = Field(default_factory=default_cache)
    """Converted models, vocabularies and logs; default: `.cache` of a checkout, else of the user's cache directory."""
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
    def _strangers_stay_out(self) -> Settings:
        mine = self.coordinator
        problem = exposure_problem(
            mine.listen, tls=mine.tls, tokens=mine.tokens is not None, allow_insecure=mine.allow_insecure
        )
        if problem is not None:
            raise ValueError(
                f"coordinator.listen: {problem}; listen on 127.0.0.1 or a UNIX socket, give coordinator.tls with "
                "coordinator.tokens or tls.client_ca, or set coordinator.allow_insecure"
            )
        return self

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
