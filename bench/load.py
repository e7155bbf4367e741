"""Load on an evaluator: callers on one link, like a gate's, each with one request in flight at all times."""

from __future__ import annotations

import asyncio
import time

from atserving.v1 import evaluator_pb2, serving_pb2
from bench.measurement import Row, quantiles_ms
from bench.processes import Evaluator
from bench.workload import Workload
from gate import responses
from gate.connection import EvaluatorConnection
from gate.responses import Response

_TIMEOUT_S = 60.0


def measure(evaluator: Evaluator, workload: Workload, callers: int, seconds: float) -> Row:
    """Run ``callers`` for about ``seconds``; return their rate and latency, and the CPU of each process."""
    before, own_s = evaluator.cpu_s(), time.process_time()
    took_s, errors, wall_s = asyncio.run(_load(evaluator, workload.image, callers, seconds))
    cpu_s = {name: used - before[name] for name, used in evaluator.cpu_s().items()}
    cpu_s["load generator"] = time.process_time() - own_s
    cpu_ms = {name: round(used / len(took_s) * 1e3, 3) for name, used in cpu_s.items()}
    what = f"evaluator, {callers} callers"
    return Row(workload.name, what, len(took_s) / wall_s, *quantiles_ms(took_s), cpu_ms, errors)


async def _load(evaluator: Evaluator, image: bytes, callers: int, seconds: float) -> tuple[list[float], int, float]:
    """Return how long each answer took, how many were errors, and the wall seconds."""
    request = evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=image)])
    connection = EvaluatorConnection(evaluator.instance, connect_timeout_s=_TIMEOUT_S)
    loop = asyncio.get_running_loop()
    took_s: list[float] = []
    ended: asyncio.Future[float] = loop.create_future()
    errors = open_calls = 0
    began_s = 0.0

    def ask() -> None:
        nonlocal open_calls
        open_calls += 1
        sent_s = time.perf_counter()
        answer = connection.ask(request, time.monotonic() + _TIMEOUT_S, "bench", None)
        answer.add_done_callback(lambda done: answered(done, sent_s))

    def answered(answer: asyncio.Future[Response], sent_s: float) -> None:
        nonlocal began_s, errors, open_calls
        open_calls -= 1
        now_s = time.perf_counter()
        # Count from the first answer on: by then every engine has work, and more is queued.
        began_s = began_s or now_s
        took_s.append(now_s - sent_s)
        errors += answer.exception() is not None or responses.error_of(answer.result()) is not None
        if now_s - began_s < seconds:
            ask()
        elif not open_calls:
            ended.set_result(now_s - began_s)

    try:
        for _ in range(callers):
            ask()
        wall_s = await ended
        return took_s, errors, wall_s
    finally:
        await connection.close()
