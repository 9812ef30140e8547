"""Any model that vLLM runs as an expert: paged KV, continuous batching, quantisation, tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from token_swarm.experts.contract import (
    Close,
    ExpertStats,
    Extend,
    Fork,
    Op,
    Open,
    Truncate,
)
from token_swarm.experts.loading import (
    ExpertLoadError,
    context_limit,
    load_tokenizer,
    require_at_least,
    source_of,
)
from token_swarm.experts.ops import row_count
from token_swarm.experts.planned import PlannedExpert
from token_swarm.experts.registry import EngineValue
from token_swarm.experts.tokenizer.prompt import PromptEncoder
from token_swarm.experts.tokenizer.spec import expert_spec
from token_swarm.experts.vllm.check import CONTEXT, SEQUENCES, check_sessions
from token_swarm.experts.vllm.engine import Chunk, VllmEngine, check_installed
from token_swarm.experts.vllm.options import check_options
from token_swarm.experts.vllm.sessions import KvShare, Session

__all__ = ["ExpertLoadError", "VllmExpert"]


class VllmExpert(PlannedExpert):
    """An expert backed by vLLM.

    Sequences are sessions of vLLM; a fork and a sequence that lost its KV to others are forwarded anew when they are
    next extended. A step runs one forward for every operation that does not depend on another of the same step;
    what does: truncating a sequence that the step has extended.
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
        engine: Mapping[str, EngineValue] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """Load `model`, a directory or hub id, and check that sessions equal plain requests.

        `engine`: vLLM's engine arguments, see `options`; the rest as for `TransformersExpert`, but that a
        `max_context` beyond what the model knows is refused. `on_failure`: see `VllmEngine`. Raises ExpertLoadError.
        """
        options = engine or {}
        try:
            check_options(options)
        except ValueError as error:
            raise ExpertLoadError(str(error)) from error
        check_installed()
        require_at_least("max_sequences", max_sequences, SEQUENCES)
        require_at_least("max_context", max_context, CONTEXT)
        if threads is not None:
            require_at_least("threads", threads, 1)
            torch.set_num_threads(threads)
        source = source_of(model)
        config, generation, tokenizer = load_tokenizer(source)
        limit = context_limit(config)
        if limit is not None and max_context >= limit:
            raise ExpertLoadError(
                f"max_context: {max_context} is not allowed, at most {limit - 1}: the model knows {limit} positions, "
                "and vLLM keeps one for the token that it samples"
            )
        self._engine = VllmEngine(
            source,
            device=device,
            dtype=dtype,
            max_sequences=max_sequences,
            max_context=max_context,
            options=options,
            on_failure=on_failure,
        )
        try:
            self._spec, self._numbering = expert_spec(
                name,
                self._engine.architecture,
                tokenizer,
                config=config,
                generation_config=generation,
                width=self._engine.probe.shape[0],
                dtype=self._engine.probe.dtype,
                max_sequences=max_sequences,
                max_context=max_context,
            )
            self._prompts = PromptEncoder(tokenizer, self._numbering)
            self._columns = torch.from_numpy(self._numbering.columns)
            self._kv = KvShare(self._engine)
            self._sessions: dict[int, Session] = {}
            self._lengths: dict[int, int] = {}
            # Sessions with tokens that wait for the next forward, as a set in order.
            self._waiting: dict[Session, None] = {}
            self._left_waiting = 0
            check_sessions(self, self._engine, self._numbering)
        except BaseException:
            self._engine.close()
            raise

    def stats(self) -> ExpertStats:
        """See `Expert.stats`. `tokens` are those whose KV is held, `capacity` is what the whole KV can hold.

        `engine` also has `evictions`, sequences that lost their KV to others so far, and `recomputed_tokens`.
        """
        engine = self._engine.gauges()
        engine["waiting"] += self._left_waiting
        engine |= {"evictions": self._kv.evictions, "recomputed_tokens": self._kv.recomputed}
        held = sum(session.cached for session in self._sessions.values())
        return ExpertStats(len(self._sessions), held, self._engine.total_blocks * self._engine.block_size, engine)

    def close(self) -> None:
        """Free the model and every sequence."""
        self._release_all()
        self._engine.close()

    def _plan(self, op: Op, row: int, logits: torch.Tensor) -> None:
        """Put down what `op` changes, and queue the tokens that need a forward."""
        match op:
            case Open(sequence):
                self._sessions[sequence] = Session([])
                self._wait(op, row)
            case Extend():
                self._wait(op, row)
            case Fork(sequence, new):
                source = self._sessions[sequence]
                self._sessions[new] = Session(list(source.tokens))
                self._kv.recomputed += len(source.tokens)
            case Truncate(sequence, length):
                if self._sessions[sequence] in self._waiting:
                    self._flush(logits)
                self._sessions[sequence].truncate(length)
            case Close(sequence) if sequence in self._sessions:
                session = self._sessions.pop(sequence)
                session.closed = True
                if session not in self._waiting:
                    self._kv.release(session)

    def _wait(self, op: Open | Extend, row: int) -> None:
        session = self._sessions[op.sequence]
        session.tokens.extend(op.tokens)
        count = row_count(op)
        start = len(session.tokens) - count
        session.wanted += [(start + index, row + index) for index in range(count)]
        self._waiting[session] = None

    def _flush(self, logits: torch.Tensor) -> None:
        """Forward what is queued, as far as the KV reaches at once."""
        queue, self._waiting = list(self._waiting), {}
        self._left_waiting = 0
        for wave in self._kv.waves(queue):
            self._left_waiting = max(self._left_waiting, len(queue) - len(wave))
            self._forward(wave, logits)
        for session in queue:
            if session.closed:
                self._kv.release(session)

    def _forward(self, wave: list[Session], logits: torch.Tensor) -> None:
        chunks = []
        wanted: dict[tuple[str, int], int] = {}
        for session in wave:
            if session.cached == 0 or session.request is None:
                # vLLM cannot roll a session back to nothing.
                if session.request is not None:
                    self._engine.release([session.request])
                session.request = self._engine.new_request()
            request = session.request
            chunks.append(
                Chunk(
                    request,
                    session.cached,
                    session.tokens[session.cached :],
                    min((position for position, _ in session.wanted), default=None),
                )
            )
            wanted |= {(request, position): row for position, row in session.wanted}

        def place(request: str, position: int, values: torch.Tensor) -> None:
            if (row := wanted.pop((request, position), None)) is not None:
                logits[row] = values[self._columns]

        self._engine.run(chunks, place)
        if wanted:
            raise RuntimeError(f"vLLM returned no logits for {len(wanted)} of the positions that were asked for")
        for session in wave:
            session.cached = len(session.tokens)
            session.wanted.clear()

    def _release_all(self) -> None:
        self._kv.release_all()
        self._sessions.clear()
        self._lengths.clear()
        self._waiting.clear()
