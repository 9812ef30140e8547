"""What an observer tells its sinks of a request."""

from __future__ import annotations

import asyncio

import pytest
from token_swarm_server.rpc.errors import ExpertUnavailable, QueueFull
from token_swarm_server.telemetry.counts import Counts
from token_swarm_server.telemetry.observer import Observer, Sink, Watch, request_id

from tests.unit.observed import a_text
from token_swarm.errors import BadParameter


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1", "abc-1"), ("a b\nc\x00é%s", "abc%s"), ("x" * 100, "x" * 64), ("\x7f\u2028id", "id")],
)
def test_a_request_id_is_safe_in_logs_and_metadata(given: str, kept: str) -> None:
    assert request_id(given) == kept


def test_a_request_without_an_id_gets_one() -> None:
    assert request_id("") != request_id("\n") != ""


@pytest.mark.parametrize(
    ("error", "remaining", "status"),
    [
        (None, None, "OK"),
        (BadParameter("max_bytes", 0, "at least 1"), None, "INVALID_ARGUMENT"),
        (QueueFull("64 wait"), None, "RESOURCE_EXHAUSTED"),
        (ExpertUnavailable("a", "it died"), None, "UNAVAILABLE"),
        (RuntimeError("a bug"), None, "INTERNAL"),
        (asyncio.CancelledError(), None, "CANCELLED"),
        (asyncio.CancelledError(), 100.0, "CANCELLED"),
        (asyncio.CancelledError(), 0.0, "DEADLINE_EXCEEDED"),
    ],
)
def test_a_request_ends_with_the_status_of_what_ended_it(
    error: BaseException | None, remaining: float | None, status: str
) -> None:
    counts = Counts(["a", "b"])
    watch = a_text(Observer([counts]), error=error, time_remaining=remaining)
    assert watch.status == status
    assert watch.error == ("" if error is None else type(error).__name__)
    assert counts.requests.failed == ({} if error is None else {status: 1})
    assert counts.requests.succeeded["max_bytes"] == (error is None)
    assert (counts.requests.running, counts.requests.waiting) == (0, 0)


def test_a_reader_that_leaves_with_the_last_message_was_served() -> None:
    watch = Observer().request("generate")
    with pytest.raises(asyncio.CancelledError), watch:
        watch.finished("end_of_text")
        raise asyncio.CancelledError
    assert (watch.status, watch.error) == ("OK", "")


def test_running_and_waiting_follow_a_request() -> None:
    counts = Counts(["a"])
    seen = []
    with Observer([counts]).request("generate") as watch:
        seen.append((counts.requests.waiting, counts.requests.running))
        watch.admitted()
        seen.append((counts.requests.waiting, counts.requests.running))
    assert seen == [(1, 0), (0, 1)]
    with pytest.raises(QueueFull), Observer([counts]).request("generate"):
        raise QueueFull("full")
    assert (counts.requests.waiting, counts.requests.running) == (0, 0)


def test_a_sink_that_breaks_spoils_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Sink):
        def request_finished(self, watch: Watch) -> None:
            raise RuntimeError("no")

    counts = Counts(["a", "b"])
    assert a_text(Observer([Broken(), counts])).status == "OK"
    assert counts.requests.succeeded["max_bytes"] == 1
    assert "Broken could not record request" in caplog.text
