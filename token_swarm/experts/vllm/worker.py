"""vLLM's worker with a tap: it hands out the logit rows that vLLM computes anyway, and those it would not compute.

vLLM's own ways to logits are slow (log-probabilities of a whole vocabulary) or see the last row only (a logits
processor). The tap sits around `compute_logits`: rows that a chunk wants beside its last join the same product with
the head's weights. Runs in every worker process; the rows are with the first one.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

FIRST_ROW = "token_swarm_first_row"
"""Key in a chunk's extra sampling arguments: the rows after the tokens from this position on are wanted."""

WORKER = f"{__name__}.TapWorker"
"""What vLLM's `worker_cls` is set to."""


class TapWorker(Worker):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's worker of this platform."""

    def load_model(self, *args: Any, **options: Any) -> None:
        """As in vLLM; then sets the tap."""
        super().load_model(*args, **options)
        self._tap = _Tap(self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        """As in vLLM."""
        self._tap.begin(scheduler_output)
        return super().execute_model(scheduler_output)

    def take_rows(self) -> tuple[list[tuple[str, int]], torch.Tensor] | None:
        """What the latest step gave: (request id, position) of each row, and the rows [n, width] on the CPU.

        None in workers that have no logits.
        """
        return self._tap.take() if self.rank == 0 else None


class _Tap:
    """Wraps two methods of a model runner: the forward, whose hidden states it keeps, and `compute_logits`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._forward, self._compute = runner._model_forward, runner.model.compute_logits
        runner._model_forward = self._keep_hidden
        runner.model.compute_logits = self._logits
        self._step: Any = None
        self._hidden: torch.Tensor | None = None
        self._clear()

    def begin(self, scheduler_output: Any) -> None:
        """A step of the scheduler starts: the next `compute_logits` is its own."""
        self._clear()
        self._step = scheduler_output if scheduler_output.total_num_scheduled_tokens else None

    def take(self) -> tuple[list[tuple[str, int]], torch.Tensor] | None:
        """See `TapWorker.take_rows`. A row is given out once."""
        if self._rows is None:
            return None
        rows = self._rows if self._chosen == list(range(self._rows.shape[0])) else self._rows[self._chosen]
        names = self._names
        self._clear()
        return names, rows.cpu()

    def _clear(self) -> None:
        self._names: list[tuple[str, int]] = []
        self._chosen: list[int] = []
        self._rows: torch.Tensor | None = None

    def _keep_hidden(self, *args: Any, **options: Any) -> Any:
        self._hidden = self._forward(*args, **options)
        return self._hidden

    def _logits(self, last: torch.Tensor) -> torch.Tensor | None:
        """`last`: hidden states after each request's last token, in batch order. Returns their logits."""
        step, hidden = self._step, self._hidden
        self._step = self._hidden = None
        if step is None or hidden is None:  # vLLM measures and warms up with batches of its own
            return self._compute(last)  # type: ignore[no-any-return]
        batch = self._runner.input_batch
        count = batch.num_reqs
        names: list[tuple[str, int]] = []
        chosen: list[int] = []
        more: list[int] = []
        start = 0
        for index, request in enumerate(batch.req_ids[:count]):
            size = step.num_scheduled_tokens[request]
            done = int(batch.num_computed_tokens_cpu[index])
            first = self._runner.requests[request].sampling_params.extra_args[FIRST_ROW]
            for position in range(max(first, done), done + size):
                names.append((request, position))
                if position == done + size - 1:
                    chosen.append(index)
                else:
                    chosen.append(count + len(more))
                    more.append(start + position - done)
            start += size
        states = torch.cat([last, hidden[more]]) if more else last
        rows = self._compute(states)
        if rows is None:
            return None
        self._names, self._chosen, self._rows = names, chosen, rows
        return rows[: last.shape[0]]  # type: ignore[no-any-return]
