"""Structured logs and request ids. Every process logs JSON lines with the same fields to standard error."""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import re
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from atserving.log_writer import MOST_BYTES, LogWriter, write_stderr

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
"""The levels of ``--log-level``, and their numbers."""

SLOW_S = 1.0
"""From so many seconds on a request is slow, unless the process is told otherwise."""

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_REQID = re.compile(r"[\x21-\x7e]{1,128}")

# Of lines of requests and of workers. The rest is for those that are rare and worth more.
_MOST_BYTES_OF_MANY = MOST_BYTES // 4 * 3
# Failures and slow requests that get a line whatever the share, in one second.
_MOST_ALWAYS = 500
_MILLION = 1_000_000
_UUID_CHARS = 36


@dataclass(frozen=True)
class LogSettings:
    """The level, the share of requests and the time that decide which lines a process writes."""

    level: str = "info"
    """The least severe level."""
    requests: float = 1.0
    """The share of the successful requests that get a line."""
    slow_s: float = SLOW_S
    """From so many seconds on a request is slow, and always gets a line."""


_settings = LogSettings()
_number = logging.INFO
_wanted = _MILLION
_service = ""
_writer: LogWriter | None = None
_followers: list[Callable[[LogSettings], None]] = []


class _BoundLogger(structlog.make_filtering_bound_logger(logging.INFO)):  # type: ignore[misc]
    """The class of all loggers. Its base has the methods that write, and does nothing in the others."""


class _Lines:
    """Takes the rendered lines of structlog."""

    def msg(self, line: bytes) -> None:
        _write(line + b"\n")

    debug = info = warning = error = critical = exception = log = msg


class _Text(io.RawIOBase):
    """Standard error of a process with a thread that writes: whole lines take the way of all others."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: Any) -> int:
        _write(bytes(data))
        return len(data)


def configure_logging(
    service: str, level: str = "info", *, requests: float = 1.0, slow_s: float = SLOW_S, threaded: bool = False
) -> None:
    """Log JSON lines to standard error, each with the field ``service``.

    ``threaded``: a thread writes them, and all other text on ``sys.stderr``. The standard library's loggers write plain
    lines, from the level warning up.
    """
    global _service, _writer
    _service = service
    if threaded and _writer is None:
        if sys.__stderr__ is None:
            # It is closed, so the next file or connection would get its number, and the lines.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _writer = LogWriter(write_stderr, _dropped)
        sys.stderr = io.TextIOWrapper(_Text(), "utf-8", "backslashreplace", line_buffering=True)
        atexit.register(_end)
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=dumps),
        ],
        wrapper_class=_BoundLogger,
        logger_factory=lambda *_: _Lines(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    apply(LogSettings(level, requests, slow_s))


def settings() -> LogSettings:
    """Return what the process logs at present."""
    return _settings


def apply(wanted: LogSettings) -> None:
    """Log what is wanted from now on: all loggers of the process follow at once."""
    global _settings, _number, _wanted
    _settings = wanted
    _number = LEVELS[wanted.level]
    _wanted = round(wanted.requests * _MILLION)
    # Loggers are bound once. A test of the level in each call would cost those that write nothing, too.
    _BoundLogger.__bases__ = (structlog.make_filtering_bound_logger(_number),)
    logging.getLogger().setLevel(max(_number, logging.WARNING))
    for each in _followers:
        each(wanted)


def follow(follower: Callable[[LogSettings], None]) -> None:
    """Call ``follower`` with all later settings."""
    _followers.append(follower)


def lines_dropped() -> int:
    """Return how many lines were dropped because nobody took them."""
    return _writer.dropped if _writer else 0


def write_worker_lines(lines: bytes) -> None:
    """Write whole lines of a worker: they leave room for those of the process itself, as those of requests do."""
    _write(lines, _MOST_BYTES_OF_MANY)


def write_always(event: str, fields: Mapping[str, Any], level: str = "info") -> bytes:
    """Write a line, from any thread and whatever the process logs; return it."""
    line = _line(_service, level, event, fields)
    _write(line)
    return line


class RequestLog:
    """Writes the one line of each request, in the form of the other lines but with less work."""

    def __init__(self, service: str, **fields: Any) -> None:
        """Each line has the field ``service``, and ``fields``."""
        self._service = service
        self._fields = fields
        self._second = self._always = 0

    def wants(self, reqid: str, code: int, seconds: float) -> bool:
        """Return whether a request gets its line: a failed or slow one does, of the others a share.

        The id decides, so every process with the same share chooses the same requests. Of an id that Envoy has made,
        Envoy chooses the same ones. In a flood of failures, the share decides about them, too.
        """
        if _number > logging.INFO:
            return False
        if _wanted >= _MILLION:
            return True
        if (code or seconds >= _settings.slow_s) and self._has_room():
            return True
        return _part(reqid) < _wanted

    def _has_room(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._always = second, 0
        self._always += 1
        return self._always <= _MOST_ALWAYS

    def write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        """Write a line if the process logs this level."""
        if LEVELS[level] >= _number:
            _write(_line(self._service, level, event, {**self._fields, **fields}), _MOST_BYTES_OF_MANY)


def _part(reqid: str) -> int:
    if len(reqid) == _UUID_CHARS:
        try:
            return int(reqid[:8], 16) % _MILLION
        except ValueError:
            pass
    return zlib.crc32(reqid.encode()) % _MILLION


def _line(service: str, level: str, event: str, fields: Mapping[str, Any]) -> bytes:
    line = {
        **fields,
        "event": event,
        "service": service,
        "level": level,
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    }
    return dumps(line) + b"\n"


def _write(lines: bytes, most: int = MOST_BYTES) -> None:
    if _writer:
        _writer.write(lines, most)
        return
    # If nobody takes the log, nobody can be told.
    with suppress(OSError):
        sys.stderr.buffer.write(lines)
        sys.stderr.buffer.flush()


def _dropped(count: int) -> bytes:
    return _line(_service, "warning", "log lines dropped", {"count": count})


def _end() -> None:
    """Write the lines that wait. The process is about to end."""
    assert _writer
    _writer.flush()
    sys.stderr = sys.__stderr__


def dumps(value: Any, **_: Any) -> bytes:
    """Return JSON. Never fails."""
    try:
        return orjson.dumps(value, default=str)
    except TypeError:
        # orjson refuses text that is not UTF-8 and integers beyond 64 bits. A log line must never fail.
        return json.dumps(value, default=str, skipkeys=True).encode()


def request_id(*given: str | None) -> str:
    """Return the first id that is one printable word of at most 128 characters, or a new one."""
    return next((each for each in given if each and _REQID.fullmatch(each)), None) or secrets.token_urlsafe(12)


def trace_context(given: str | None) -> str | None:
    """Return the caller's W3C ``traceparent``, or None if it is missing or malformed."""
    return given if given and _TRACEPARENT.fullmatch(given) else None


def trace_id(traceparent: str | None) -> str | None:
    """Return the id of the trace in a ``traceparent``, or None."""
    return traceparent[3:35] if traceparent else None
