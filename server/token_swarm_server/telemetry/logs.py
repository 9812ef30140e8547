"""Log lines for people or machines, and one line at the end of every request.

No line holds a prompt, a text or a credential. Nothing in a line can be mistaken for another line.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from token_swarm_server.telemetry.observer import Sink, Watch

logger = logging.getLogger("token_swarm_server.requests")
console_logger = logging.getLogger("token_swarm_server.console")

# Ours are told apart from libraries, which have to warn to be heard.
_OWN = ("token_swarm", "token_swarm_server")


class LogFormat(StrEnum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least severe lines that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Send this process's log to standard error; libraries from `warning` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in _OWN:
        logging.getLogger(name).setLevel(level.upper())


WARNING_PREFIX = "warning: "
"""Of the lines that `configure_warnings` writes."""


def configure_warnings() -> None:
    """Send warnings and errors to standard error, those of the project's own modules as `warning: what it is`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WarningFormatter())
    # Libraries with a handler of their own would otherwise say everything twice.
    handler.addFilter(lambda record: not logging.getLogger(record.name.partition(".")[0]).handlers)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the event's own fields, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`time LEVEL logger message key=value ...`; the lines of an exception follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and those of the exception."""
        fields = "".join(f" {key}={_shown(value)}" for key, value in _flat(getattr(record, "fields", {})))
        message = _one_line(record.getMessage())
        line = f"{_time(record)} {record.levelname} {record.name.rpartition('.')[2]}: {message}{fields}"
        if record.exc_info:
            line += "".join(f"\n  {_one_line(one)}" for one in self.formatException(record.exc_info).splitlines())
        return line


class _WarningFormatter(logging.Formatter):
    """`warning: message`, of a library `warning LIBRARY: message`; the lines of an exception follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and those of the exception."""
        library = "" if record.name.partition(".")[0] in _OWN else f" {record.name}"
        line = f"{record.levelname.lower()}{library}: {_one_line(record.getMessage())}"
        if record.exc_info:
            line += "".join(f"\n  {_one_line(one)}" for one in self.formatException(record.exc_info).splitlines())
        return line


class LineLog(io.StringIO):
    """A file whose lines go into the log: for a console that a machine reads."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = ""

    def write(self, text: str) -> int:
        """Log the lines that are complete; empty ones are left out."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(None, map(str.strip, lines)):
            console_logger.info("%s", line)
        return len(text)


class RequestLog(Sink):
    """Logs every request when it is over."""

    def request_finished(self, watch: Watch) -> None:
        """Write its line, if anybody reads it."""
        if logger.isEnabledFor(logging.INFO):
            logger.info("request", extra={"fields": request_fields(watch)})


def request_fields(watch: Watch) -> dict[str, Any]:
    """What is told of a finished request. Seconds have six digits; what is not known is left out."""
    work = watch.work
    ended = watch.ended_at or watch.started_at
    experts = {
        name: {
            "weight": weight,
            "share": _round(work.shares.get(name)),
            "tokens": work.tokens.get(name),
            "queue_seconds": _round(times.queue) if (times := watch.experts.get(name)) else None,
            "compute_seconds": _round(times.compute) if times else None,
            "transport_seconds": _round(times.transport) if times else None,
        }
        for name, weight in watch.weights.items()
    }
    fields = {
        "request_id": watch.id,
        "kind": watch.kind,
        "status": watch.status,
        "reason": watch.reason,
        "error": watch.error or None,
        "unit": watch.unit or None,
        "rule": watch.rule or None,
        "prompt_bytes": watch.prompt_bytes,
        "bytes": watch.length,
        "seconds": _round(ended - watch.started_at),
        "queue_seconds": _since(watch.started_at, watch.admitted_at),
        "first_byte_seconds": _since(watch.started_at, watch.first_text_at),
        "mixing_seconds": _round(watch.mixing),
        "dropped": list(work.dropped) or None,
        "reopened": work.reopened or None,
        "experts": {name: _known(expert) for name, expert in experts.items()} or None,
    }
    return _known(fields)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else _round(end - start)


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested fields with dotted names: experts.gemma3.share."""
    flat: list[tuple[str, Any]] = []
    for key, value in fields.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat


def _shown(value: Any) -> str:
    """A value without spaces as it is, any other in JSON's quotes."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and text.isascii() and not set(text) & set(' "=') and text else json.dumps(text)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
