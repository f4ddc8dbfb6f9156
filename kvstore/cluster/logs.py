"""Log lines: one per event, for people or as JSON. Only `kvstore.*` loggers are touched."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.cluster.config import LogConfig

ROOT = "kvstore"
"""All loggers of the library are below this one."""


def log_event(logger: logging.Logger, level: int, event: str, message: str, **fields: Any) -> None:
    """Write one event: a sentence for people, a name and fields for programs."""
    logger.log(level, message, extra={"fields": {"event": event, **fields}})


def configure_logging(config: LogConfig, stream: TextIO | None = None) -> logging.Handler:
    """Write the library's log lines to a stream, standard error by default. Replaces an earlier call's handler.

    Returns:
        The handler, for `logging.getLogger("kvstore").removeHandler`.
    """
    logger = logging.getLogger(ROOT)
    for handler in [handler for handler in logger.handlers if isinstance(handler.formatter, LineFormatter)]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(config.level.upper())
    logger.propagate = False
    return handler


class LineFormatter(logging.Formatter):
    """`TIME level logger: message key=value …`, always one line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_plain(value)}" for name, value in _fields(record).items())
        parts = [f"{_time(record)} {record.levelname.lower()} {record.name}:", record.getMessage(), fields]
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        return _one_line(" ".join(part for part in parts if part))


class JsonFormatter(LineFormatter):
    """One JSON object per line: `time`, `level`, `logger`, `message`, then the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or " " in text or '"' in text else text


def _one_line(text: str) -> str:
    """Peers' words appear in messages: nothing of them may begin a line of its own or steer a terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
