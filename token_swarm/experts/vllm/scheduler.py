"""vLLM's scheduler with a rollback: a chunk says how much of its session's KV stays.

A session is one resumable request, as vLLM's streaming input makes them: every chunk extends it and its KV stays.
vLLM itself can only append. This module imports vLLM's private scheduler; `check` finds out at start whether
it still behaves as described here.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

KEEP = "token_swarm_keep"
"""Key in a chunk's extra sampling arguments: tokens of the session that stay, counted from its start."""


class RollbackScheduler(Scheduler):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's scheduler; counts what its latest step ran, and its preemptions."""

    running_now = 0
    """Sequences of the latest step."""
    waiting_now = 0
    """Chunks that the latest step left for later."""
    preemptions = 0

    def schedule(self, *args: Any, **options: Any) -> SchedulerOutput:
        """As in vLLM."""
        output = super().schedule(*args, **options)
        self.running_now = len(output.num_scheduled_tokens)
        self.waiting_now = self.get_num_unfinished_requests() - len(self.running)
        return output

    def _preempt_request(self, *args: Any, **options: Any) -> None:
        self.preemptions += 1
        super()._preempt_request(*args, **options)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """Roll the session back before vLLM appends the chunk. What lies behind `keep` is overwritten.

        Exact only without prefix caching (a cached block would be overwritten under its old hash) and without the
        hybrid KV manager (it frees blocks that a sliding window has left, which a rollback needs again).
        """
        keep = update.sampling_params.extra_args[KEEP]
        if keep < session.num_computed_tokens:
            session.num_computed_tokens = keep
            del session.prompt_token_ids[keep:]
            session.num_prompt_tokens = len(session.prompt_token_ids)
        super()._update_request_as_session(session, update)
