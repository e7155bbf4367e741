"""The stream between gate and instance loses, repeats and mixes up no call. Both ends are real, over a real socket."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving import transport
from atserving.config import Instance
from atserving.v1 import evaluator_pb2_grpc
from atserving.v1.evaluator_pb2 import Call, ExchangeRequest, ExchangeResponse, InferRequest, InferResponse
from evaluator.serving.stream import MOST_OPEN, GateStream
from gate.connection import EvaluatorConnection, TransportError

WAIT_S = 60.0
Context = grpc.aio.ServicerContext[ExchangeRequest, ExchangeResponse]


@dataclass
class Echo(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Replies with the request's params after ``wait``; counts its calls and cancellations by params."""

    wait: Callable[[str], Awaitable[object]] | None = None
    ran: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    frames: int = 0

    async def Exchange(  # type: ignore[override]
        self, request_iterator: AsyncIterator[ExchangeRequest], context: Context
    ) -> None:
        async def counted() -> AsyncIterator[ExchangeRequest]:
            async for frame in request_iterator:
                self.frames += 1
                yield frame

        await GateStream(self._infer).run(counted(), context.write)

    async def _infer(self, call: Call) -> InferResponse:
        name = call.request.params_json
        self.ran[name] += 1
        self.changed.set()
        try:
            if self.wait:
                await self.wait(name)
        except asyncio.CancelledError:
            self.cancelled[name] += 1
            self.changed.set()
            raise
        return InferResponse(result_json=name)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def serving(servicer: Echo, port: int = 0) -> AsyncIterator[tuple[transport.Server, EvaluatorConnection, int]]:
    server = transport.Server([])
    evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(servicer, server.grpc)
    port = await server.start(f"127.0.0.1:{port}")
    instance = Instance(app="a", version="v", id="i", address=f"127.0.0.1:{port}", capacity=1)
    connection = EvaluatorConnection(instance, connect_timeout_s=WAIT_S)
    try:
        yield server, connection, port
    finally:
        await connection.close()
        await server.stop(0)


def ask(connection: EvaluatorConnection, name: str, timeout_s: float = WAIT_S) -> asyncio.Task[InferResponse]:
    return asyncio.create_task(connection.infer(InferRequest(params_json=name), timeout_s, None))


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_each_call_gets_its_own_reply_in_any_order_of_completion(data: st.DataObject, count: int) -> None:
    names = [str(number) for number in range(count)]
    order = data.draw(st.permutations(names))
    cancelled = data.draw(st.sets(st.sampled_from(names)))

    async def run() -> None:
        ready = {name: asyncio.Event() for name in names}
        echo = Echo(lambda name: ready[name].wait())
        async with serving(echo) as (_, connection, _):
            tasks = {name: ask(connection, name) for name in names}
            await echo.until(lambda: echo.ran.total() == count)
            for name in cancelled:
                tasks[name].cancel()
            await echo.until(lambda: set(echo.cancelled) == cancelled)
            for name in order:
                ready[name].set()
            outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
        for name, outcome in zip(names, outcomes, strict=True):
            if name in cancelled:
                assert isinstance(outcome, asyncio.CancelledError)
            else:
                assert isinstance(outcome, InferResponse)
                assert outcome.result_json == name
        assert echo.ran == Counter(names)
        assert echo.cancelled == Counter(cancelled)

    asyncio.run(run())


async def test_waiting_calls_share_a_message() -> None:
    echo = Echo()
    async with serving(echo) as (_, connection, _):
        await asyncio.gather(*(ask(connection, str(n)) for n in range(200)))
        assert echo.frames < 20


async def test_call_cancelled_before_it_is_sent_never_runs() -> None:
    echo = Echo()
    async with serving(echo) as (_, connection, _):
        task = ask(connection, "cancelled")
        await asyncio.sleep(0)
        task.cancel()
        await ask(connection, "next")
        assert echo.ran == {"next": 1}


async def test_deadline_cancels_the_call_at_the_instance() -> None:
    echo = Echo(lambda _: asyncio.Event().wait())
    timeout_s = 0.05
    async with serving(echo) as (_, connection, _):
        # On a busy machine a deadline may pass before the call has begun.
        while not echo.ran:
            with pytest.raises(TimeoutError):
                await ask(connection, "slow", timeout_s)
            timeout_s *= 2
        await echo.until(lambda: echo.cancelled == echo.ran)


async def test_broken_stream_fails_its_calls_and_is_opened_again() -> None:
    echo = Echo(lambda _: asyncio.Event().wait())
    async with serving(echo) as (server, connection, port):
        lost = ask(connection, "lost")
        await echo.until(lambda: echo.ran.total() == 1)
        await server.stop(0)
        with pytest.raises(TransportError) as caught:
            await lost
        assert caught.value.reached
        with pytest.raises(TransportError) as caught:
            await ask(connection, "refused")
        assert not caught.value.reached
        await echo.until(lambda: echo.cancelled == {"lost": 1})
        async with serving(Echo(), port):
            while True:
                try:
                    answer = await ask(connection, "back")
                    break
                except TransportError as error:
                    assert not error.reached
                    await asyncio.sleep(0.01)
            assert answer.result_json == "back"


async def test_closed_connection_cancels_all_its_calls_at_the_instance() -> None:
    echo = Echo(lambda _: asyncio.Event().wait())
    async with serving(echo) as (_, connection, _):
        tasks = [ask(connection, str(n)) for n in range(5)]
        await echo.until(lambda: echo.ran.total() == 5)
        await connection.close()
        failed = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, TransportError) for each in failed)
        await echo.until(lambda: echo.cancelled.total() == 5)
        # A call on a closed connection must fail at once, not wait until its deadline.
        with pytest.raises(TransportError, match="closed"):
            await ask(connection, "late")


async def test_large_calls_are_split_into_several_messages() -> None:
    echo = Echo()
    async with serving(echo) as (_, connection, _):
        big = "x" * (3 << 20)
        answers = await asyncio.gather(*(ask(connection, big + str(n)) for n in range(30)))
    assert [answer.result_json[-2:].strip("x") for answer in answers] == [str(n) for n in range(30)]


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
