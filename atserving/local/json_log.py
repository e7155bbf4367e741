"""Wait for lines in the JSON log of a process."""

from __future__ import annotations

import time
from typing import Any

import orjson

from atserving.local import proc
from atserving.local.child import ChildProcess

_POLL_S = 0.02
_LAST_LINES = 30


def wait_logged(child: ChildProcess, timeout_s: float, *present: str, **fields: Any) -> dict[str, Any]:
    """Block until a process has logged a line with the fields ``present``, and ``fields`` with their values.

    Returns the first such line. Raises TimeoutError, also as soon as the process has ended without it.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        may_log_more = proc.is_alive(child.pid)
        # The last line may not be whole yet.
        for text in child.log_text().split("\n")[:-1]:
            line: dict[str, Any] = orjson.loads(text) if text.startswith("{") else {}
            if line.keys() >= {*present, *fields} and all(line[name] == fields[name] for name in fields):
                return line
        if not may_log_more:
            break
        time.sleep(_POLL_S)
    end = "\n".join(child.log_text().splitlines()[-_LAST_LINES:])
    raise TimeoutError(f"no line with {', '.join([*present, *map(repr, fields.items())])} was logged:\n{end}")
