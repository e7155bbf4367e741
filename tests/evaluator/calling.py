"""Call a running evaluator as a gate does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from atserving.config import Instance
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.serving.pipeline import fetches
from gate.connection import EvaluatorConnection
from gate.responses import Response
from tests.evaluator.digits import DIGITS
from tests.processes import Process
from tests.waiting import PATIENCE_S

DIGIT = Resource(body=(DIGITS / "images" / "7.png").read_bytes())
"""An image of a seven."""


def address(process: Process) -> str:
    """Return the evaluator's gRPC address. Blocks until it is registered."""
    return str(process.logged("instance", "address")["address"])


@asynccontextmanager
async def connected(process: Process, at: str = "") -> AsyncIterator[EvaluatorConnection]:
    """Connect to an evaluator, at another address than its own if that is given."""
    registered = process.logged("address", "instance", event="instance registered")
    named = process.logged("app", "version")
    instance = Instance(
        app=named["app"],
        version=named["version"],
        id=registered["instance"],
        address=at or registered["address"],
        capacity=1,
    )
    connection = EvaluatorConnection(instance, connect_timeout_s=PATIENCE_S)
    try:
        yield connection
    finally:
        await connection.close()


def ask(
    connection: EvaluatorConnection,
    request: InferRequest,
    timeout_s: float = 30,
    reqid: str = "",
    traceparent: str | None = None,
    stays: bool = True,
    batched: bool = False,
) -> asyncio.Future[InferResponse]:
    """Send a request over a connection; if it ``stays``, as a gate without another instance does."""
    deadline_s = time.monotonic() + timeout_s
    answer = connection.ask(
        request, deadline_s, reqid, traceparent, stays=stays, batched=batched, fetches=fetches(request)
    )
    return asyncio.ensure_future(whole(answer))


async def whole(answer: asyncio.Future[Response]) -> InferResponse:
    """Return a response as a message, also a large one."""
    response = await answer
    if isinstance(response, InferResponse):
        return response
    result = bytes(response.result)
    if response.is_stream:
        return InferResponse(stream=result, message=response.message)
    return InferResponse(result_json=result.decode(), message=response.message)


async def infer(
    process: Process, *data: Resource, timeout: float = 30, reqid: str = "", **fields: Any
) -> InferResponse:
    """Send one request over a connection of its own."""
    async with connected(process) as evaluator:
        return await ask(evaluator, InferRequest(data=data, **fields), timeout, reqid)
