"""A net for drills: its params say what it does. It answers with them, so that a caller can tell its own answer.

{"do": "sleep", "s": 0.5}     answers later; the requests of a batch sleep together
{"do": "work", "s": 0.02}     the same, one after the other
{"do": "bytes", "mib": 8}     answers with that many MiB
{"do": "hang"}                never returns
{"do": "crash"}               ends the process
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
    return [_answer(params) for params in wanted]


def _seconds(wanted: Sequence[Mapping[str, Any]]) -> float:
    sleeps = [params["s"] for params in wanted if params.get("do") == "sleep"]
    work = [params["s"] for params in wanted if params.get("do") == "work"]
    return float(max(sleeps, default=0) + sum(work))


def _answer(params: Mapping[str, Any]) -> dict[str, Any]:
    do = params.get("do")
    if do == "hang":
        time.sleep(3600)
    if do == "crash":
        os.abort()
    if do == "bytes":
        return {"code": 0, "message": "", "result_file": b"drill..." * (params["mib"] << 17)}
    return {"code": 0, "message": "", "result": {"echo": params}}
