"""Structured logs and request ids. Every process logs JSON lines with the same fields to standard error."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from typing import Any

import orjson
import structlog

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQID = re.compile(r"[\x21-\x7e]{1,128}")


def configure_logging(service: str, level: str = "info") -> None:
    """Log JSON lines to standard error, each with the field ``service``.

    The standard library's loggers write plain lines, from the level warning up.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
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


def _dumps(value: Any, **_: Any) -> bytes:
    try:
        return orjson.dumps(value, default=str)
    except TypeError:
        # orjson refuses text that is not UTF-8 and integers beyond 64 bits. A log line must never fail.
        return json.dumps(value, default=str, skipkeys=True).encode()


def request_id(given: str | None) -> str:
    """Return the caller's request id, or a new one unless it is one printable word of at most 128 characters."""
    return given if given and _REQID.fullmatch(given) else secrets.token_urlsafe(12)


def trace_context(given: str | None) -> str | None:
    """Return the caller's W3C ``traceparent``, or None if it is missing or malformed."""
    return given if given and _TRACEPARENT.fullmatch(given) else None
