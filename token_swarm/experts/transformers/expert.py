"""Any Hugging Face causal LM as an expert: packed batches over a slot cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from token_swarm import memory
from token_swarm.experts.contract import (
    Close,
    ExpertSpec,
    ExpertStats,
    Extend,
    Fork,
    Op,
    Open,
)
from token_swarm.experts.loading import ExpertLoadError, context_limit, device_of, require_at_least
from token_swarm.experts.ops import row_count
from token_swarm.experts.planned import PlannedExpert
from token_swarm.experts.tokenizer.numbering import Numbering
from token_swarm.experts.tokenizer.prompt import PromptEncoder
from token_swarm.experts.tokenizer.spec import expert_spec
from token_swarm.experts.transformers.check import CONTEXT, SEQUENCES, NotFinite, PlainForward, RoundingDiffers
from token_swarm.experts.transformers.loading import load
from token_swarm.experts.transformers.logic_check import check_logic
from token_swarm.experts.transformers.packed_attention import Run
from token_swarm.experts.transformers.packed_model import pack, packed_forward, weight_bytes
from token_swarm.experts.transformers.slot_cache import SlotCache

logger = logging.getLogger(__name__)

__all__ = ["ExpertLoadError", "TransformersExpert"]

_CHUNK = 256
"""Most tokens of one forward: it bounds the memory of a long prefill."""


@dataclass(slots=True)
class _Waiting:
    """Tokens of one slot that wait for the next forward."""

    start: int
    tokens: list[int] = field(default_factory=list)
    # (index in tokens, row of the step's result)
    wanted: list[tuple[int, int]] = field(default_factory=list)


class TransformersExpert(PlannedExpert):
    """An expert backed by a Hugging Face causal LM.

    A step runs one forward for every operation that does not depend on another of the same step; operations
    on different sequences never do. What does: extending a sequence that the same step truncated after
    extending it, or forked from a sequence the step had extended before.
    """

    def __init__(
        self,
        name: str,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        max_sequences: int = 16,
        max_context: int = 2048,
    ) -> None:
        """Load `model`, a directory or hub id, and check that packed steps equal its plain forward.

        `dtype` is "float32", "bfloat16", "float16" or "auto": float32 on a CPU, elsewhere the checkpoint's own.
        `threads` sets torch's intra-op threads for the whole process (None leaves them).
        `max_context` is lowered to what the model knows. Raises ExpertLoadError.
        """
        require_at_least("max_sequences", max_sequences, SEQUENCES)
        require_at_least("max_context", max_context, CONTEXT)
        if threads is not None:
            require_at_least("threads", threads, 1)
            torch.set_num_threads(threads)
        self._device = device_of(device)
        self._model: Any = None
        self._slots: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._clear_plan()
        try:
            self._load(name, model, dtype, max_sequences, max_context)
        except (NotFinite, RoundingDiffers) as error:
            if dtype != "auto" or self._spec.dtype == torch.float32:
                raise
            logger.warning("expert %s is served in float32: %s", name, error)
            self._release_all()
            self._model = None
            self._load(name, model, "float32", max_sequences, max_context)

    def _load(self, name: str, model: str | Path, dtype: str, max_sequences: int, max_context: int) -> None:
        """Load `model`, make it ready for packed batches and check both. Raises ExpertLoadError."""
        self._model, tokenizer = load(model, self._device, dtype)
        limit = context_limit(self._model.config)
        context = check_logic(self._model, max_context if limit is None else min(max_context, limit), CONTEXT)
        self._spec, self._numbering = _spec(name, self._model, tokenizer, max_sequences, context)
        self._prompts = PromptEncoder(tokenizer, self._numbering)
        self._cache = SlotCache(max_sequences, context)

        plain = {}
        for cudnn in _cudnn_choices(self._device):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            plain[cudnn] = PlainForward(self._model, self._spec, self._numbering, self._prompts)
        columns = torch.from_numpy(self._numbering.columns).to(self._device)
        in_order = pack(self._model, columns)
        self._weight_bytes = weight_bytes(self._model)
        # What is not packed stays as it is in memory: its rows are put in order one by one.
        self._columns = None if in_order else columns
        try:
            self._check(plain, lambda: load(model, self._device, dtype)[0])
        except (TypeError, RuntimeError, LookupError) as error:
            message = f"model: {self._spec.architecture} cannot be served in packed batches: {error}"
            raise ExpertLoadError(message) from error
        memory.trim()
        logger.info(
            "expert %s: %s, weights %.0f MB, KV %.0f KB a token (%d sequences of %d tokens), process %.0f MB",
            name, str(self._spec.dtype).removeprefix("torch."), self._weight_bytes / 1e6,
            self._cache.nbytes_per_token / 1e3, max_sequences, context, memory.resident_bytes() / 1e6,
        )  # fmt: skip

    def _check(self, plain: Mapping[bool, PlainForward], load_plain: Callable[[], Any]) -> None:
        """Compare with plain forwards, by whether cuDNN's attention may be used; the first that agree decide.

        `load_plain`: the model once more, to see how far it differs from itself where that is not known yet.
        """
        last = list(plain)[-1]
        for cudnn, forward in plain.items():
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            try:
                forward.compare(self)
                return
            except RoundingDiffers:
                self._release_all()
                if cudnn != last:
                    continue
                if forward.measured:
                    raise
                forward.measure_floor(load_plain())
                forward.compare(self)

    def stats(self) -> ExpertStats:
        """See `Expert.stats`."""
        capacity, tokens = self._spec.max_sequences * self._spec.max_context, sum(self._lengths.values())
        held = {"weight_bytes": self._weight_bytes, "kv_bytes": tokens * self._cache.nbytes_per_token}
        return ExpertStats(len(self._lengths), tokens, capacity, held)

    def close(self) -> None:
        """Free the model and every sequence."""
        self._release_all()
        self._model = None

    @torch.inference_mode()
    def _plan(self, op: Op, row: int, logits: torch.Tensor) -> None:
        """Queue what `op` needs of a forward; run the queue first where `op` depends on it."""
        match op:
            case Open(sequence):
                self._slots[sequence] = self._take_slot(logits)
                self._wait(op, 0, row)
            case Extend(sequence):
                slot, start = self._slots[sequence], self._lengths[sequence]
                queued = self._waiting.get(slot)
                if slot in self._unready or (queued and queued.start + len(queued.tokens) != start):
                    self._flush(logits)
                self._wait(op, start, row)
            case Fork(sequence, new):
                source, length = self._slots[sequence], self._lengths[sequence]
                target = self._slots[new] = self._take_slot(logits)
                if source in self._waiting or source in self._unready:
                    self._unready.add(target)
                    self._afterwards.append(lambda: self._cache.copy(source, target, length))
                else:
                    self._cache.copy(source, target, length)
            case Close(sequence) if sequence in self._slots:
                slot = self._slots.pop(sequence)
                if slot in self._waiting or slot in self._unready:
                    self._afterwards.append(lambda: self._cache.release(slot))
                else:
                    self._cache.release(slot)

    def _take_slot(self, logits: torch.Tensor) -> int:
        if not self._cache.has_free_slot:
            self._flush(logits)
        return self._cache.take()

    def _wait(self, op: Open | Extend, start: int, row: int) -> None:
        waiting = self._waiting.setdefault(self._slots[op.sequence], _Waiting(start))
        waiting.tokens.extend(op.tokens)
        count = row_count(op)
        end = len(waiting.tokens)
        waiting.wanted.extend((end - count + index, row + index) for index in range(count))

    @torch.inference_mode()
    def _flush(self, logits: torch.Tensor) -> None:
        """Run the queued forwards, then what had to wait for them."""
        runs: list[Run] = []
        tokens: list[int] = []
        wanted: list[tuple[int, int]] = []
        for slot, waiting in self._waiting.items():
            fed = 0
            while fed < len(waiting.tokens):
                count = min(len(waiting.tokens) - fed, _CHUNK - len(tokens))
                runs.append(Run(slot, waiting.start + fed, count, len(tokens)))
                shift = len(tokens) - fed
                wanted += [(at + shift, row) for at, row in waiting.wanted if fed <= at < fed + count]
                tokens += waiting.tokens[fed : fed + count]
                fed += count
                if len(tokens) == _CHUNK:
                    self._forward(runs, tokens, wanted, logits)
                    runs, tokens, wanted = [], [], []
        if tokens:
            self._forward(runs, tokens, wanted, logits)
        for action in self._afterwards:
            action()
        self._clear_plan()

    def _forward(self, runs: list[Run], tokens: list[int], wanted: list[tuple[int, int]], logits: torch.Tensor) -> None:
        """One forward over `runs`; batch row i of each wanted (i, j) becomes row j of `logits`."""
        rows_of_batch = packed_forward(self._model, self._cache, runs, tokens, [at for at, _ in wanted])
        if wanted:
            found = rows_of_batch if self._columns is None else rows_of_batch[:, self._columns]
            rows = [row for _, row in wanted]
            # Mostly a batch gives all rows in order, several MB of them: they are copied as one block.
            ordered = rows == list(range(rows[0], rows[0] + len(rows)))
            logits[slice(rows[0], rows[-1] + 1) if ordered else rows] = found.to("cpu", self._spec.dtype)

    def _clear_plan(self) -> None:
        self._waiting: dict[int, _Waiting] = {}
        # Slots whose contents are copied once the queued forwards have run.
        self._unready: set[int] = set()
        self._afterwards: list[Callable[[], None]] = []

    def _release_all(self) -> None:
        self._slots.clear()
        self._lengths.clear()
        self._clear_plan()
        self._cache.release_all()


def _cudnn_choices(device: torch.device) -> tuple[bool, ...]:
    """Whether to try cuDNN's attention, the best choice first: it is planned anew for every length of a sequence, which
    took 2 to 3 ms a layer and token on an H200."""
    as_it_is = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    return (False, True) if device.type == "cuda" else (as_it_is,)


def _spec(name: str, model: Any, tokenizer: Any, max_sequences: int, max_context: int) -> tuple[ExpertSpec, Numbering]:
    head = model.get_output_embeddings()
    if head is None:
        raise ExpertLoadError(f"model: {type(model).__name__} has no language-model head")
    return expert_spec(
        name,
        type(model).__name__,
        tokenizer,
        config=model.config,
        generation_config=model.generation_config,
        width=head.weight.shape[0],
        dtype=model.dtype,
        max_sequences=max_sequences,
        max_context=max_context,
    )
