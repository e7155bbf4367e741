"""A net for drills: its params say what it does. It answers with them, so that a caller can tell its own answer.

- ``{"do": "sleep", "s": 0.5}`` answers later; the requests of a batch sleep together.
- ``{"do": "work", "s": 0.02}`` is the same, one request after the other.
- ``{"do": "burn", "s": 0.02}`` takes that much CPU time.
- ``{"do": "bytes", "mib": 8}`` answers with that many MiB.
- ``{"do": "hang"}`` never returns.
- ``{"do": "crash"}`` ends the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any


def net_init(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": "", "batch_size": 8}


def net_inference(model: Mapping[str, Any], args: Mapping[str, Any]) -> list[dict[str, Any]]:
    wanted = [req.get("params") or {} for req in args["reqs"]]
    time.sleep(_seconds(wanted))
    _burn(sum(params["s"] for params in wanted if params.get("do") == "burn"))
    return [_answer(params) for params in wanted]


def _seconds(wanted: Sequence[Mapping[str, Any]]) -> float:
    sleeps = [params["s"] for params in wanted if params.get("do") == "sleep"]
    work = [params["s"] for params in wanted if params.get("do") == "work"]
    return float(max(sleeps, default=0) + sum(work))


def _burn(seconds: float) -> None:
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


def _answer(params: Mapping[str, Any]) -> dict[str, Any]:
    do = params.get("do")
    if do == "hang":
        time.sleep(3600)
    if do == "crash":
        os.abort()
    if do == "bytes":
        return {"code": 0, "message": "", "result_file": b"drill..." * (params["mib"] << 17)}
    return {"code": 0, "message": "", "result": {"echo": params}}
