"""A stream of the gRPC service answers each call once, and bounds the calls in flight."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

from atserving.v1.evaluator_pb2 import Call, ExchangeRequest, ExchangeResponse, InferResponse
from evaluator.serving.stream import MOST_OPEN, GateStream


async def test_calls_of_one_stream_are_bounded() -> None:
    unblocked = asyncio.Event()
    running = 0
    written: list[ExchangeResponse] = []

    async def infer(_: Call) -> InferResponse:
        nonlocal running
        running += 1
        await unblocked.wait()
        return InferResponse()

    async def write(frame: ExchangeResponse) -> None:
        written.append(frame)

    async def flood() -> AsyncIterator[ExchangeRequest]:
        yield ExchangeRequest(calls=[Call(id=n) for n in range(MOST_OPEN + 100)])

    stream = asyncio.create_task(GateStream(infer).run(flood(), write))
    while running < MOST_OPEN:  # noqa: ASYNC110 - a turn of the loop at a time
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert running == MOST_OPEN
    unblocked.set()
    await stream
    assert Counter(reply.id for frame in written for reply in frame.replies) == Counter(range(MOST_OPEN + 100))
