"""A running evaluator replies over real gRPC, and follows a real registry with a real etcd."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atserving import transport
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from gate.answers import TransportError
from tests.evaluator.calling import DIGIT, address, ask, connected, infer
from tests.evaluator.digits import DIGITS, digits_tar
from tests.processes import Process, Registry, evaluator
from tests.slow_link import slow_link
from tests.waiting import until, until_async

IMAGES = DIGITS / "images"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
LOOPBACK = ("--allow-network", "127.0.0.0/8")


class SlowHost:
    """A web server that sends an image only after ``unblocked`` is set."""

    def __init__(self) -> None:
        self.url = ""
        self.asked = asyncio.Event()
        self.unblocked = asyncio.Event()

    async def answer(self, _: web.Request) -> web.Response:
        self.asked.set()
        await self.unblocked.wait()
        return web.Response(body=DIGIT.body)


@pytest.fixture
async def slow_host() -> AsyncIterator[SlowHost]:
    host = SlowHost()
    app = web.Application()
    app.router.add_get("/{path:.*}", host.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host.url = f"http://127.0.0.1:{runner.addresses[0][1]}/7.png"
    yield host
    host.unblocked.set()
    await runner.cleanup()


@pytest.fixture(scope="module")
def digits(registry: Registry) -> Iterator[Process]:
    """Run one evaluator for all tests that do not change it."""
    registry.publish("digits", custom_values={"net": "classify"})
    with evaluator(registry, "digits", "v1", *LOOPBACK) as process:
        yield process


async def test_classifier_names_every_digit(digits: Process) -> None:
    async with connected(digits) as evaluator:
        requests = {path: InferRequest(data=[Resource(body=path.read_bytes())]) for path in sorted(IMAGES.glob("?.*"))}
        responses = await asyncio.gather(*(ask(evaluator, each) for each in requests.values()))
    for path, response in zip(requests, responses, strict=True):
        result = orjson.loads(response.result_json)
        assert [list(result), list(result["confidences"][0])] == [["confidences"], ["index", "class", "score"]]
        assert len(result["confidences"]) == 1
        best = result["confidences"][0]
        assert (best["index"], best["class"]) == (int(path.stem), NAMES[int(path.stem)])
        assert 0.5 < best["score"] <= 1


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 3), (10, 10), (11, 10), (10**30, 10)])
async def test_limit_gives_the_number_of_classes_best_first(digits: Process, limit: int, count: int) -> None:
    response = await infer(digits, DIGIT, params_json=f'{{"limit": {limit}}}')
    confidences = orjson.loads(response.result_json)["confidences"]
    scores = [each["score"] for each in confidences]
    assert len(confidences) == len({each["index"] for each in confidences}) == count
    assert scores == sorted(scores, reverse=True)
    assert confidences[0]["class"] == "seven"


@pytest.mark.parametrize(
    ("data", "fields", "message"),
    [
        ([DIGIT], {"params_json": '{"limit": 0}'}, "params.limit should be a positive integer"),
        ([DIGIT], {"params_json": '{"limit": -1}'}, "params.limit should be a positive integer"),
        ([DIGIT], {"params_json": '{"limit": true}'}, "params.limit should be a positive integer"),
        ([DIGIT], {"params_json": '{"limit": 1.0}'}, "params.limit should be a positive integer"),
        ([DIGIT], {"params_json": '{"limit": "1"}'}, "params.limit should be a positive integer"),
        ([DIGIT], {"params_json": '{"limit": null}'}, "params.limit should be a positive integer"),
        ([DIGIT], {"params_json": "[]"}, "params should be an object"),
        ([DIGIT], {"params_json": "{"}, "params is not JSON"),
        ([DIGIT], {"params_json": '{"limit": NaN}'}, "params is not JSON"),
        ([DIGIT], {"params_json": '{"x": ' + "1" * 4301 + "}"}, "params has an integer of more than 4300 digits"),
        ([DIGIT], {"params_json": "[" * 100_000}, "params is nested more than 128 levels deep"),
        ([Resource(body=DIGIT.body, attribute_json="x")], {}, "attribute is not JSON"),
        ([DIGIT, DIGIT], {}, "classify takes one image, not a list of them"),
        ([DIGIT], {"group": True}, "classify takes one image, not a list of them"),
        ([], {}, "the request has no data"),
        ([DIGIT] * 65, {}, "the request has 65 resources, more than 64"),
        ([Resource()], {}, "neither a uri nor a body"),
        ([Resource(body=b"no image")], {}, "the image can't be decoded"),
        ([Resource(body=bytes(10 << 20) + b"1")], {}, "larger than 10485760 bytes"),
        ([Resource(uri="file:///etc/passwd")], {}, "unsupported uri"),
        ([Resource(uri="http://169.254.169.254/latest")], {}, "not a public address"),
    ],
)
async def test_bad_request_gets_an_error_that_names_the_mistake(
    digits: Process, data: list[Resource], fields: dict[str, Any], message: str
) -> None:
    response = await infer(digits, *data, **fields)
    assert response.WhichOneof("outcome") == "error"
    assert (response.error.code, response.error.status, response.error.refused) == (400, 400, False)
    assert message in response.error.message


async def test_group_for_a_built_in_net_is_refused_before_its_download(digits: Process, slow_host: SlowHost) -> None:
    response = await infer(digits, *[Resource(uri=slow_host.url)] * 2)
    assert response.error.message == "classify takes one image, not a list of them"
    assert not slow_host.asked.is_set()


async def test_resources_are_fetched_from_their_uris(digits: Process, slow_host: SlowHost) -> None:
    slow_host.unblocked.set()
    data = "data:image/png;base64," + base64.b64encode(DIGIT.body).decode()
    for uri in (slow_host.url, data):
        response = await infer(digits, Resource(uri=uri))
        assert orjson.loads(response.result_json)["confidences"][0]["class"] == "seven"


async def test_unreachable_host_gives_code_502(digits: Process) -> None:
    response = await infer(digits, Resource(uri="http://127.0.0.1:1/x"))
    assert (response.error.code, response.error.refused) == (502, False)


async def test_each_request_has_one_line_in_the_log(digits: Process) -> None:
    async with connected(digits) as evaluator:
        request = InferRequest(data=[DIGIT])
        await ask(evaluator, request, reqid="one-line", traceparent=TRACEPARENT)
        await ask(evaluator, InferRequest(data=[Resource(body=b"x")]), reqid="bad-line")
    good, bad = digits.logged(reqid="one-line"), digits.logged(reqid="bad-line")
    stages = ["fetch_ms", "decode_ms", "queue_ms", "forward_ms", "total_ms"]
    assert all(good[stage] >= 0 for stage in stages)
    assert (good["app"], good["version"], good["code"], good["traceparent"]) == ("digits", "v1", 0, TRACEPARENT)
    assert good["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert (bad["code"], bad["level"]) == (400, "info")
    assert "can't be decoded" in bad["reason"]
    assert sum("one-line" in line for line in digits.lines) == 1


async def test_server_has_health_checks_and_reflection(digits: Process) -> None:
    async with transport.channel(address(digits)) as channel:
        service = evaluator_pb2.DESCRIPTOR.services_by_name["EvaluatorService"].full_name
        for name in ("", service):
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
        listed = [each.name async for response in call for each in response.list_services_response.service]
        assert service in listed


async def test_direct_caller_gets_its_answers_over_grpc(digits: Process) -> None:
    async with transport.channel(address(digits)) as channel:
        stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
        data = "data:image/png;base64," + base64.b64encode(DIGIT.body).decode()
        requests = [InferRequest(data=[DIGIT]), InferRequest(data=[Resource(uri=data)]), InferRequest()]
        calls = [
            stub.Infer(each, metadata=(("x-reqid", f"direct-{number}"),), timeout=30)
            for number, each in enumerate(requests)
        ]
        *good, bad = [await call for call in calls]
        assert [orjson.loads(each.result_json)["confidences"][0]["class"] for each in good] == ["seven"] * 2
        assert bad.error.message == "the request has no data"
        assert [digits.logged(reqid=f"direct-{number}")["code"] for number in range(3)] == [0, 0, 400]


async def test_direct_caller_who_leaves_or_whose_deadline_passes_frees_capacity(
    registry: Registry, slow_host: SlowHost
) -> None:
    registry.publish("direct")
    registry.put("worker/app/direct/release/v1", {"max_concurrent": 1})
    with evaluator(registry, "direct", "v1", *LOOPBACK) as process:
        async with transport.channel(address(process)) as channel:
            stub = evaluator_pb2_grpc.EvaluatorServiceStub(channel)
            slow = InferRequest(data=[Resource(uri=slow_host.url)])
            leaving = stub.Infer(slow)
            await slow_host.asked.wait()
            assert (await stub.Infer(slow)).error.code == 429
            leaving.cancel()

            async def free() -> bool:
                probe = InferRequest(data=[Resource(uri="http://127.0.0.1:1/")])
                return (await stub.Infer(probe)).error.code != 429

            await until_async(free, what="the caller's place is free")
            # Either end may notice it first.
            try:
                assert (await stub.Infer(slow, timeout=0.2)).error.code == 504
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until_async(free, what="the late call's place is free")


async def test_full_instance_refuses_at_once_and_a_cancelled_request_frees_capacity(
    registry: Registry, slow_host: SlowHost
) -> None:
    registry.publish("full")
    registry.put("worker/app/full/release/v1", {"max_concurrent": 1})
    with evaluator(registry, "full", "v1", *LOOPBACK) as process:
        async with connected(process) as full:
            request = InferRequest(data=[Resource(uri=slow_host.url)])
            in_flight = ask(full, request, reqid="in-flight")
            await slow_host.asked.wait()
            error = (await ask(full, request)).error
            assert (error.code, error.status, error.refused) == (429, 429, True)
            assert error.retry_after_ms > 0
            # It waits for a slow host, which keeps nobody else from the net.
            assert (await ask(full, InferRequest(data=[DIGIT]))).result_json
            in_flight.cancel()
            assert (await asyncio.to_thread(process.logged, reqid="in-flight"))["code"] == 499
            slow_host.unblocked.set()
            assert (await ask(full, request)).result_json


async def test_request_is_cancelled_after_its_deadline(registry: Registry, slow_host: SlowHost) -> None:
    registry.publish("late")
    registry.put("worker/app/late/release/v1", {"max_concurrent": 1})
    with evaluator(registry, "late", "v1", *LOOPBACK) as process:
        timeout_ms = 150
        # On a busy machine a deadline may pass before the request has begun.
        while not slow_host.asked.is_set():
            timeout_ms *= 2
            reqid = f"late-{timeout_ms}"
            with pytest.raises(TimeoutError):
                await infer(process, Resource(uri=slow_host.url), reqid=reqid, timeout=timeout_ms / 1000)
        assert (await asyncio.to_thread(process.logged, reqid=reqid))["code"] in (499, 504)
        assert (await infer(process, DIGIT)).result_json


async def test_worker_config_applies_live_and_a_deleted_release_stays_served(registry: Registry) -> None:
    registry.publish("live")
    with evaluator(registry, "live") as process:
        await until(lambda: [each["capacity"] for each in registry.instances("live")] == [64])
        registry.put("worker/app/live/default", {"max_concurrent": 7, "delay4batch": "1ms"})
        await until(lambda: [each["capacity"] for each in registry.instances("live")] == [7])
        registry.delete("eval/live/v1")
        await asyncio.to_thread(process.logged, event="release deleted")
        assert (await infer(process, DIGIT)).result_json


async def test_draining_instance_finishes_requests_in_flight_and_refuses_others(
    registry: Registry, slow_host: SlowHost
) -> None:
    registry.publish("draining")
    with evaluator(registry, "draining", "v1", *LOOPBACK) as process:
        async with connected(process) as draining:
            request = InferRequest(data=[Resource(uri=slow_host.url)])
            in_flight = ask(draining, request)
            await slow_host.asked.wait()
            process.terminate()
            await asyncio.to_thread(process.logged, event="instance deregistered")
            assert registry.instances("draining") == []
            error = (await ask(draining, InferRequest(data=[DIGIT]))).error
            assert (error.code, error.refused) == (503, True)
            slow_host.unblocked.set()
            assert orjson.loads((await in_flight).result_json)["confidences"][0]["class"] == "seven"
        assert await asyncio.to_thread(process.wait) == 0
        assert process.logged(event="service stopped")


LONG = b"""
def net_init(cfg):
    return {"batch_size": 1}

def net_inference(model, args):
    return [{"code": 0, "result_file": bytes(4 << 20)} for req in args["reqs"]]
"""


async def test_a_long_answer_leaves_whole_before_its_instance_stops(registry: Registry, tmp_path: Path) -> None:
    registry.publish("long", file=digits_tar(tmp_path / "release.tar", **{"net.py": LONG}))
    with evaluator(registry, "long") as process:
        async with slow_link(address(process)) as slow, connected(process, slow.address) as draining:
            answer = ask(draining, InferRequest(data=[DIGIT]))
            while slow.passed_back < 1 << 20:
                await asyncio.wait({answer}, timeout=0.01)
            process.terminate()
            assert len((await answer).stream) == 4 << 20
        assert await asyncio.to_thread(process.wait) == 0


async def test_grace_bounds_the_time_of_draining(registry: Registry, slow_host: SlowHost) -> None:
    registry.publish("graceless")
    with evaluator(registry, "graceless", "v1", *LOOPBACK, "--grace", "0") as process:
        async with connected(process) as draining:
            request = InferRequest(data=[Resource(uri=slow_host.url)])
            in_flight = ask(draining, request)
            await slow_host.asked.wait()
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0
            with pytest.raises(TransportError):
                await in_flight


SCRIPT = b"""
import os, time

def net_init(cfg):
    return {"batch_size": 4}

def net_inference(model, args):
    rets = []
    for req in args["reqs"]:
        do = (req.get("params") or {}).get("do")
        if do == "sleep":
            print("asleep")
            time.sleep(1000)
        if do == "die":
            os._exit(1)
        group = isinstance(req["data"], list)
        sizes = [os.path.getsize(each["uri"]) for each in (req["data"] if group else [req["data"]])]
        rets.append({"code": 0, "result": {"sizes": sizes, "group": group}})
        if do == "stream":
            rets[-1] = {"code": 0, "message": "bytes", "result_file": bytes(3)}
    return rets
"""


async def test_script_replies_and_its_crashes_fail_no_other_request(registry: Registry, tmp_path: Path) -> None:
    registry.publish("script", file=digits_tar(tmp_path / "release.tar", **{"net.py": SCRIPT}))
    # A call may run for so long, whatever its caller's deadline is.
    registry.put("worker/app/script/default", {"timeout": "2s"})
    with evaluator(registry, "script") as process:
        async with connected(process) as script:

            async def do(what: str, *data: Resource, timeout: float = 30, **fields: Any) -> InferResponse:
                request = InferRequest(data=data or [DIGIT], params_json=f'{{"do": "{what}"}}', **fields)
                return await ask(script, request, timeout)

            size = len(DIGIT.body)
            assert orjson.loads((await do("answer")).result_json) == {"sizes": [size], "group": False}
            pair = await do("answer", DIGIT, Resource(body=b"12"), group=True)
            assert orjson.loads(pair.result_json) == {"sizes": [size, 2], "group": True}
            stream = await do("stream")
            assert (stream.stream, stream.message) == (bytes(3), "bytes")
            died, *others = await asyncio.gather(do("die"), *(do("answer") for _ in range(8)))
            assert (died.error.code, died.error.message) == (500, "the net's process died")
            assert all(orjson.loads(other.result_json)["sizes"] == [size] for other in others)

            def asleep() -> bool:
                return any('"asleep"' in line for line in process.lines)

            stuck: list[asyncio.Task[InferResponse]] = []
            # On a busy machine a deadline may pass before the call has begun.
            while not asleep():
                stuck.append(asyncio.create_task(do("sleep", timeout=2 << len(stuck))))
                await until(lambda: asleep() or stuck[-1].done())
            others = await asyncio.gather(*(do("answer") for _ in range(8)))
            assert all(orjson.loads(other.result_json)["sizes"] == [size] for other in others)
            for each in stuck:
                # The instance fails the call, unless the caller gives up first.
                with suppress(TimeoutError):
                    assert (await each).error.code == 504
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
