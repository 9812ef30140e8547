"""The lines that logs are written in, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from token_swarm_server.rpc.errors import ExpertUnavailable
from token_swarm_server.telemetry.logs import JsonFormatter, LineLog, RequestLog, TextFormatter
from token_swarm_server.telemetry.observer import Observer

from tests.unit.observed import a_text


def logged(formatter: logging.Formatter, **call: Any) -> str:
    """The lines that a request writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    log = logging.getLogger("token_swarm_server.requests")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        a_text(Observer([RequestLog()]), **call)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return stream.getvalue()


def test_a_request_ends_in_one_line_of_json() -> None:
    (text,) = logged(JsonFormatter(), given_id="job 7\n").splitlines()
    line = json.loads(text)
    assert (line["request_id"], line["status"], line["reason"]) == ("job7", "OK", "max_bytes")
    assert (line["level"], line["logger"], line["message"]) == ("info", "token_swarm_server.requests", "request")
    assert (line["bytes"], line["prompt_bytes"], line["dropped"], line["reopened"]) == (5, 10, ["b"], 1)
    assert line["experts"]["a"]["share"] == 0.25
    assert line["experts"]["a"]["queue_seconds"] == 0.1
    assert 0 <= line["first_byte_seconds"] <= line["seconds"]
    assert "error" not in line


def test_a_request_ends_in_one_line_of_text() -> None:
    (line,) = logged(TextFormatter(), error=ExpertUnavailable("a", "secret text"), given_id="r1").splitlines()
    assert "INFO requests: request request_id=r1 kind=generate status=UNAVAILABLE error=ExpertUnavailable" in line
    assert "experts.a.weight=0.3" in line
    # The message may quote what a client sent.
    assert "secret" not in line


def test_a_line_cannot_be_forged() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "hello\n2026 INFO forged\x1b[31m", (), None)
    record.fields = {"note": 'a "b" = c\n', "empty": "", "plain": "x-1"}
    text = TextFormatter().format(record)
    assert "\n" not in text
    assert "\x1b" not in text
    assert text.endswith('note="a \\"b\\" = c\\n" empty="" plain=x-1')
    assert "\n" not in JsonFormatter().format(record)


def test_a_console_for_machines_writes_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "token_swarm_server.console")
    console = Console(file=LineLog(), width=1000, color_system=None)
    with Progress(console=console) as progress:
        progress.update(progress.add_task("expert a: ready", total=1), completed=1)
    console.print("serving on 127.0.0.1:50061")
    assert [record.getMessage() for record in caplog.records][-1] == "serving on 127.0.0.1:50061"
    assert caplog.records[0].getMessage().startswith("expert a: ready")


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("oops")
    except ValueError as error:
        record = logging.LogRecord("x.y", logging.ERROR, "f", 1, "bad", (), (ValueError, error, error.__traceback__))
    assert "ValueError: oops" in json.loads(JsonFormatter().format(record))["exception"]
    assert all(line.startswith("  ") for line in TextFormatter().format(record).splitlines()[1:])
