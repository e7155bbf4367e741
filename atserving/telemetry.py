"""Structured logs and request ids. Every process logs JSON lines with the same fields to standard error."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import re
import secrets
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_number = logging.INFO

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQID = re.compile(r"[\x21-\x7e]{1,128}")


def configure_logging(service: str, level: str = "info") -> None:
    """Log JSON lines to standard error, each with the field ``service``.

    The standard library's loggers write plain lines, from the level warning up.
    """
    global _number
    number = _number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(stream=sys.stderr, level=max(number, logging.WARNING), format="%(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(file=sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


class RequestLog:
    """Writes the one line of each request, in the form of the other lines but away from the request's path.

    The lines of one turn of the event loop leave in one write; those of a process that ends normally are never lost.
    """

    def __init__(self, service: str, **fields: Any) -> None:
        """Each line has the field ``service``, and ``fields``."""
        self._service = service
        self._fields = fields
        self._lines: list[bytes] = []
        # The loop that will write the lines.
        self._loop: asyncio.AbstractEventLoop | None = None
        atexit.register(self.flush)

    def write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        """Write a line if the process logs this level."""
        if _LEVELS[level] < _number:
            return
        line = {
            **self._fields,
            **fields,
            "event": event,
            "service": self._service,
            "level": level,
            "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        self._lines.append(_dumps(line) + b"\n")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if self._loop is not loop:
            self._loop = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the lines that wait."""
        self._loop = None
        if self._lines:
            lines, self._lines = self._lines, []
            sys.stderr.buffer.write(b"".join(lines))
            sys.stderr.buffer.flush()


def _dumps(value: Any, **_: Any) -> bytes:
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
