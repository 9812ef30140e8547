"""Requests that an observer is told of, and experts as they live: what tests of metrics, logs and traces look at."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from token_swarm_server.telemetry.counts import Counts
from token_swarm_server.telemetry.observer import Observer, Step, Watch, Work
from token_swarm_server.telemetry.status import LiveExpert

from token_swarm.experts.contract import ExpertStats

LIVE = {
    "a": LiveExpert("ready", "", 2, 3, 16, ExpertStats(sequences=4, tokens=50, capacity=200, engine={"waiting": 7.0})),
    "b": LiveExpert("down", "exited with code -9", 0, 0, 8, None),
}


def a_text(observer: Observer, *, error: BaseException | None = None, **call: Any) -> Watch:
    """A request with one call to each expert, two chunks, and the end that `error` says."""
    call.setdefault("kind", "generate")
    watch = observer.request(call.pop("kind"), prompt_bytes=10, **call)
    with contextlib.suppress(Exception, asyncio.CancelledError), watch:
        watch.planned("linear", "byte", {"a": 0.3, "b": 0.7})
        watch.encoded({"a": 4, "b": 5})
        watch.admitted()
        watch.forward("a", 0.1, 0.2, 0.3, 7)
        watch.mixed(0.001)
        watch.text(3)
        watch.text(2)
        watch.worked(Work({"a": 2, "b": 1}, {"a": 0.25, "b": 0.75}, ("b",), 1, {"a": 5}, {"a": 3}))
        if error is not None:
            raise error
        watch.finished("max_bytes")
    return watch


def busy() -> Counts:
    """Counts of two texts, one cancelled; one score; and a step."""
    counts = Counts(["a", "b"])
    observer = Observer([counts])
    a_text(observer)
    a_text(observer, error=asyncio.CancelledError())
    with observer.request("score", prompt_bytes=100) as watch:
        watch.admitted()
        watch.finished("scored")
    observer.step(Step("a", 0.05, 0.04, submissions=2, batch=3, tokens=9, rows=3, logits_bytes=1200))
    observer.expert_changed("b", "down", "exited")
    return counts
