"""A request's line has the form of all other lines, and none is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

WRITES = """
import asyncio, sys, structlog
from atserving.telemetry import RequestLog, configure_logging

configure_logging("gate", sys.argv[1])
lines = RequestLog("gate", app="a")
fields = {"reqid": "r", "code": 0, "total_ms": 1.5, "traceparent": None}

async def main():
    structlog.get_logger().bind(app="a").info("request finished", **fields)
    lines.write("info", "request finished", fields)
    lines.write("debug", "request seen", {})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    print("turned", file=sys.stderr, flush=True)
    lines.write("info", "request finished", {"reason": "\\ud800 odd", "code": 2**70})
    lines.write("info", "request finished", {"code": 499})

asyncio.run(main())
lines.write("info", "request finished", {"code": 1})
"""


def written(level: str) -> list[Any]:
    run = subprocess.run(
        [sys.executable, "-c", WRITES, level], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return [json.loads(line) if line.startswith("{") else line for line in run.stderr.splitlines()]


def test_line_has_the_fields_of_other_lines_in_their_order() -> None:
    usual, own, turned, odd, gone, late = written("info")
    assert turned == "turned"
    assert list(own) == list(usual)
    assert len(own.pop("timestamp")) == len(usual.pop("timestamp"))
    assert own == usual
    # Text that orjson refuses is written all the same, and no line of a process that ends is lost.
    assert "odd" in odd["reason"]
    assert [gone["code"], late["code"]] == [499, 1]


def test_level_filters_lines() -> None:
    assert written("error") == ["turned"]
    assert "request seen" in [line["event"] for line in written("debug") if line != "turned"]
