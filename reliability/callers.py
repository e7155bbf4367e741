"""The callers of the scenarios."""

from __future__ import annotations

from reliability.traffic import Stream

EVERY_KIND = (
    Stream("octets", 10),
    Stream("data_uri", 8, version="v2"),
    Stream("http_uri", 8, version="v1"),
    Stream("typed", 8),
    Stream("octets", 6, app="quick"),
    Stream("drill", 6),
    Stream("batch", 2),
    Stream("typed_batch", 2),
)
"""50 requests a second of every kind; two kinds are batches of 20."""

VICTIM = (Stream("octets", 20),)
"""A caller of ``/v1/eval/digits`` amid attacks."""
