"""The time in the queue of an instance, as its replies and its log tell it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import orjson

from atserving.config import Instance
from atserving.v1.evaluator_pb2 import InferRequest
from gate.record import Attempt
from tests.evaluator.calling import DIGIT, connected
from tests.evaluator.digits import digits_tar
from tests.processes import Evaluator, Registry, evaluator
from tests.waiting import PATIENCE_S, until

COUNT = 60
SCRIPT = b"""
import time

def net_init(cfg):
    return {"batch_size": 1}

def net_inference(model, args):
    time.sleep(0.02)
    return [{"code": 0, "result": 1} for _ in args["reqs"]]
"""


async def test_a_request_that_waits_for_many_others_was_in_the_queue(registry: Registry, tmp_path: Path) -> None:
    registry.publish("queue", file=digits_tar(tmp_path / "release.tar", **{"net.py": SCRIPT}))
    with evaluator(registry, "queue", "v1", "--sandbox=off") as process:
        attempts = [
            Attempt(Instance(app="queue", version="v1", id="one", address="", capacity=1), "", 0) for _ in range(COUNT)
        ]
        async with connected(process) as gate:
            deadline_s = time.monotonic() + PATIENCE_S
            request = InferRequest(data=[DIGIT])
            await asyncio.gather(
                *(gate.ask(request, deadline_s, f"queue-{i}", None, attempt=each) for i, each in enumerate(attempts))
            )
        lines = await _finished(process)
    longest = max(lines, key=lambda line: float(line["total_ms"]))
    # The instance has sent few of them to its worker at a time.
    assert longest["queue_ms"] > 0.8 * longest["total_ms"]
    told_us = max(attempt.stages[1] for attempt in attempts)
    assert told_us > 0.8e3 * longest["total_ms"]


async def _finished(process: Evaluator) -> list[dict[str, Any]]:
    def lines() -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in process.lines if '"request finished"' in line]

    await until(lambda: len(lines()) == COUNT, "all requests are in the log")
    return lines()
