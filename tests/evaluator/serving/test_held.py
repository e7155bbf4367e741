"""An instance bounds the bytes of requests and answers that its front holds, and refuses what is over it."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from atserving import link
from atserving.held import HeldBytes
from atserving.v1.evaluator_pb2 import Hello, InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.serving.link_server import LinkServer
from tests.evaluator.calling import DIGIT, ask, connected, infer
from tests.evaluator.digits import digits_tar
from tests.evaluator.serving.fronts import pipeline
from tests.instance import ScriptedInstance
from tests.processes import Registry, evaluator, start_evaluator
from tests.waiting import until_async

MIB = 1 << 20
# Two of these exceed three quarters of 24 MiB.
LARGE = 19 * MIB // 2


class Replier:
    """Takes replies."""

    def __init__(self) -> None:
        self.errors: list[Any] = []
        self.holds = True

    def hold(self, count: int) -> bool:
        return self.holds

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        self.errors.append(InferResponse.FromString(bytes(reply.response)).error)


async def test_bodies_are_counted_until_the_end_of_their_requests(tmp_path: Path) -> None:
    held = HeldBytes(4 * MIB)
    served, replier = pipeline(tmp_path, held), Replier()
    calls = [link.Call(number, 0, 0, b"r", b"", bytes(MIB)) for number in range(5)]
    calls[4] = calls[4]._replace(request=b"x")
    first, second, third, refused, small = (served.begin(call, replier) for call in calls)
    assert [each.ended for each in (first, second, third, refused, small)] == [False, False, False, True, False]
    (error,) = replier.errors
    assert (error.status, error.refused, error.retry_after_ms > 0) == (429, True, True)
    assert held.held == 3 * MIB + 1
    assert served.capacity.in_flight == 4
    first.abandon()
    second.expire()
    (id_, *_) = served.worker._calls
    served.worker._take_reply(link.Reply(id_, link.RESULT, 0, 0, 0, 0, 1, 1, b""))
    assert third.ended
    assert held.held == 1
    assert not served.begin(calls[3], replier).ended


async def test_tasks_of_batches_leave_places_to_others(tmp_path: Path) -> None:
    served, replier = pipeline(tmp_path, HeldBytes(MIB)), Replier()
    served.capacity.limit = 4
    flags = [link.BATCHED] * 4 + [0] * 2
    calls = [served.begin(link.Call(at, 0, each, b"r", b"", b"x"), replier) for at, each in enumerate(flags)]
    assert [each.ended for each in calls] == [False, False, False, True, False, True]
    assert [(error.status, error.refused) for error in replier.errors] == [(429, True)] * 2


async def test_an_answer_without_room_is_an_error(tmp_path: Path) -> None:
    held = HeldBytes(4 * MIB)
    served, replier = pipeline(tmp_path, held), Replier()
    replier.holds = False
    for size in (1000, 100_000):
        served.begin(link.Call(1, 0, 0, b"r", b"", b"x"), replier)
        (id_,) = served.worker._calls
        response = InferResponse(stream=bytes(size)).SerializeToString()
        served.worker._take_reply(link.Reply(id_, link.RESULT, 0, 0, 0, 0, 1, 1, response))
    assert [error.status for error in replier.errors] == [0, 503]
    assert replier.errors[1].message == "the instance holds as many bytes of unread answers as it can"
    assert not replier.errors[1].refused
    assert held.held == 0


async def test_answers_are_counted_until_the_gate_has_read_them() -> None:
    held = HeldBytes(64 * MIB)
    answered = asyncio.Event()

    class Answerer(ScriptedInstance):
        def begin(self, call: link.Call, replier: Any, held: int | None = None) -> Any:
            assert replier.hold(16 * MIB)
            replier.reply(link.Reply(call.id, link.RESULT, 0, 0, 0, 0, 0, 0, bytes(16 * MIB)), 16 * MIB)
            answered.set()
            return type("Ended", (), {"ended": True})

    async def never(_: InferRequest) -> InferResponse:
        raise AssertionError

    server = Answerer(never)
    server.links = LinkServer(held)
    instance = await server.start()
    host, port = instance.address.split(":")
    loop = asyncio.get_running_loop()
    with socket.create_connection((host, int(port))) as gate:
        gate.setblocking(False)
        hello = Hello(app="a", version="v", instance="i").SerializeToString()
        await loop.sock_sendall(gate, link.PREFACE + link.frame(link.HELLO, hello))
        await loop.sock_sendall(gate, link.call_head(1, 0, 0, b"", b"", 0))
        await answered.wait()
        assert held.held == 16 * MIB
        while not held.take(48 * MIB, large=True):
            assert await loop.sock_recv(gate, MIB)
        held.give(48 * MIB)
        # A second one is given up with its connection.
        answered.clear()
        await loop.sock_sendall(gate, link.call_head(2, 0, 0, b"", b"", 0))
        await answered.wait()
    await until_async(lambda: done(not held.held), what="the answer is given up")
    await server.stop()


async def done(value: bool) -> bool:
    return value


@asynccontextmanager
async def one_byte_host() -> AsyncIterator[str]:
    """Return the URL of a host that sends one byte."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=b"x")

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


@pytest.fixture
async def unfinished_url() -> AsyncIterator[str]:
    """Return the URL of a host that sends ``LARGE`` bytes, and then nothing."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(bytes(LARGE))
        await asyncio.Event().wait()
        return response

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


async def test_fetched_bytes_are_counted_as_they_arrive(registry: Registry, unfinished_url: str) -> None:
    registry.publish("held", custom_values={"net": "classify"})
    flags = ("--max-held", "24", "--allow-network", "127.0.0.0/8")
    with evaluator(registry, "held", "v1", *flags) as process:
        async with connected(process) as instance:
            fetch = InferRequest(data=[Resource(uri=unfinished_url)])
            large = InferRequest(data=[Resource(body=bytes(LARGE))])
            fetching = ask(instance, fetch)

            async def refused() -> bool:
                nonlocal fetching
                if fetching.done():
                    # It came while a large request was there.
                    fetching = ask(instance, fetch)
                error = (await ask(instance, large)).error
                assert error.status == 400 or error.refused
                return error.status == 429

            await until_async(refused, what="there is no room for a second large request")
            # A small one has room.
            assert (await ask(instance, InferRequest(data=[DIGIT]))).result_json
            fetching.cancel()

            async def taken() -> bool:
                return (await ask(instance, large)).error.status == 400

            await until_async(taken, what="there is room again")


def test_bound_below_the_largest_request_fails_to_start(registry: Registry) -> None:
    registry.publish("tight", custom_values={"net": "classify"})
    process = start_evaluator(registry.address, "tight", "v1", "--max-held", "23")
    assert process.wait() == 1
    assert process.lines[-1] == (
        "evaluator: --max-held is 23, should be at least 24: a request of the release can take 18209173 bytes"
    )


LENGTHS = b"""
def net_init(cfg): return {}
def net_inference(model, args):
    lengths = [[len(each["body"]) for each in req["data"]] for req in args["reqs"]]
    return [{"code": 0, "message": "", "result": each} for each in lengths]
"""
JSON = '"' + "\U0001f600" * ((MIB - 4) // 2) + '"'


def data_uri(length: int) -> Resource:
    return Resource(
        uri="data:" + "x" * 400 + ";base64," + base64.b64encode(bytes(length)).decode(), attribute_json=JSON
    )


async def test_the_least_bound_takes_the_largest_request_of_a_built_in_net(registry: Registry) -> None:
    registry.publish("least", custom_values={"net": "classify"})
    with evaluator(registry, "least", "v1", "--max-held", "24") as process:
        answer = await infer(process, data_uri(10 * MIB), params_json=JSON)
    # It is no image.
    assert answer.error.status == 400


async def test_the_least_bound_takes_the_largest_request_of_a_script(registry: Registry, tmp_path: Path) -> None:
    limits = {"max_bytes": MIB, "max_request_bytes": 2 * MIB}
    registry.publish("group", custom_values=limits, file=digits_tar(tmp_path / "group.tar", **{"net.py": LENGTHS}))
    refused = start_evaluator(registry.address, "group", "v1", "--max-held", "14")
    assert refused.wait() == 1
    async with one_byte_host() as url:
        with evaluator(registry, "group", "v1", "--max-held", "15", "--allow-network", "127.0.0.0/8") as process:
            data = [data_uri(MIB), data_uri(MIB - 1), Resource(uri=url)]
            answer = await infer(process, *data, group=True)
    assert answer.result_json == f"[{MIB},{MIB - 1},1]"
