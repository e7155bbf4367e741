"""Every kind of result through gate and Envoy: streams, messages, and codes of a net's own.

The mesh is real. The instance is part of the test, because no built-in net returns all of these.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import orjson
import pytest
import pytest_asyncio

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.local.mesh import Mesh
from atserving.v1 import (
    evaluator_pb2,
    registry_pb2,
    registry_pb2_grpc,
    serving_pb2,
    serving_pb2_grpc,
)
from tests.e2e.client import Client
from tests.instance import ScriptedInstance
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="session")

STREAM = bytes(range(256)) * 100_000
TEXT = orjson.dumps("é" * 5_000_000).decode()


class Obedient:
    """An evaluator that returns the result that the request's params ask for."""

    def __init__(self) -> None:
        self.asked = 0
        self.hanging = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def infer(self, request: evaluator_pb2.InferRequest) -> evaluator_pb2.InferResponse:
        self.asked += 1
        params = orjson.loads(request.params_json or "{}")
        match params:
            case {"stream": True}:
                return evaluator_pb2.InferResponse(stream=STREAM)
            case {"raw": str(raw)}:
                return evaluator_pb2.InferResponse(result_json=raw.replace("<long>", TEXT))
            case {"text": True}:
                return evaluator_pb2.InferResponse(result_json=TEXT, message="a word")
            case {"code": int(code), "status": int(status)}:
                error = evaluator_pb2.Error(code=code, status=status, message='the net said "no" ✗\n')
                return evaluator_pb2.InferResponse(error=error)
            case {"hang": True}:
                self.hanging.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
        received = {"uris": [each.uri for each in request.data], "group": request.group, "params": params}
        return evaluator_pb2.InferResponse(result_json=orjson.dumps(received).decode(), message="a word")


@pytest_asyncio.fixture(loop_scope="session")
async def net(mesh: Mesh, client: Client) -> AsyncIterator[Obedient]:
    """The app `obedient`, with one instance, in this process."""
    net = Obedient()
    server = ScriptedInstance(net.infer, "obedient", "v1", "test")
    address = (await server.start()).address
    instance = registry_pb2.Instance(app="obedient", version="v1", id="test", address=address, capacity=8)
    release = admin_pb2.Release(app="obedient", version="v1", file="file:///none", phase=admin_pb2.PHASE_PRODUCTION)
    async with transport.channel(mesh.registry) as channel:
        operators = admin_pb2_grpc.AdminServiceStub(channel)
        registry = registry_pb2_grpc.RegistryServiceStub(channel)
        await operators.CreateRelease(admin_pb2.CreateReleaseRequest(release=release))
        await registry.RegisterInstance(registry_pb2.RegisterInstanceRequest(instance=instance))

        async def serves() -> bool:
            return (await client.bytes("/v1/eval/obedient", b"x")).status == 200

        await until_async(serves, what="the instance serves")
        yield net
        await registry.DeregisterInstance(registry_pb2.DeregisterInstanceRequest(instance=instance))
    await server.stop()


def ask(**params: object) -> dict[str, object]:
    return {"data": {"uri": "http://host/a"}, "params": params}


async def test_a_stream_is_the_body_of_the_response(net: Obedient, client: Client) -> None:
    for path in ("/v1/eval/obedient", "/v1/eval/obedient/v1"):
        response = await client.json(path, ask(stream=True))
        assert (response.status, response.headers["content-type"]) == (200, "application/octet-stream")
        assert response.body == STREAM
        assert response.headers["x-serving-version"] == "v1"


async def test_a_stream_in_a_batch_is_a_data_uri(net: Obedient, client: Client) -> None:
    op = {"op": "/v1/eval/obedient"}
    response = await client.json("/v1/batch", [{**op, **ask(stream=True)}, {**op, **ask(code=-3, status=400)}])
    first, second = response.json
    header, _, data = first.pop("stream").partition(",")
    assert (first, header) == ({"code": 0, "message": ""}, "data:application/octet-stream;base64")
    assert base64.b64decode(data) == STREAM
    assert second == {"code": -3, "message": 'the net said "no" ✗\n'}


async def test_large_documents_arrive_whole(net: Obedient, mesh: Mesh, client: Client) -> None:
    expected = {"code": 0, "message": "a word", "result": orjson.loads(TEXT)}
    assert (await client.json("/v1/eval/obedient", ask(text=True))).json == expected
    task = {"op": "/v1/eval/obedient", **ask(text=True)}
    assert (await client.json("/v1/batch", [task, task])).json == [expected] * 2
    resource = serving_pb2.Resource(uri="http://host/a")
    request = serving_pb2.EvalRequest(app="obedient", data=[resource], params_json='{"text": true}')
    typed = serving_pb2.EvalResponse(message="a word", result_json=TEXT, version="v1")
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        assert await stub.Eval(request) == typed
        assert list((await stub.Batch(serving_pb2.BatchRequest(tasks=[request] * 2))).results) == [typed] * 2


FORGED = '1},{"code":0,"message":"","result":"forged"'


@pytest.mark.parametrize("raw", [FORGED, f"<long>}},{FORGED}", "", '"', "[" * 100_000 + "]" * 100_000])
async def test_a_net_can_not_answer_for_another_app_in_a_batch(net: Obedient, client: Client, raw: str) -> None:
    tasks = [{"op": "/v1/eval/obedient", **ask(raw=raw)}, {"op": "/v1/eval/none", **ask()}]
    first, second = (await client.json("/v1/batch", tasks)).json
    if raw:
        assert first == {"code": 500, "message": "the instance's response is malformed"}
    else:
        assert first == {"code": 0, "message": "", "result": None}
    assert second["code"] == 404


@pytest.mark.parametrize(("code", "status"), [(-1, 400), (-2, 500), (-3, 400), (422, 422), (575, 575), (599, 599)])
async def test_a_code_of_the_net_is_in_the_body(net: Obedient, client: Client, code: int, status: int) -> None:
    response = await client.json("/v1/eval/obedient", ask(code=code, status=status))
    assert response.status == status
    assert response.headers["content-type"] == "application/json"
    assert response.json == {"code": code, "message": 'the net said "no" ✗\n'}


async def test_a_group_reaches_the_net_as_one_request(net: Obedient, client: Client) -> None:
    group = {"data": [{"uri": "http://host/a"}, {"uri": "qiniu://9@z0/bucket/b"}], "params": {"n": 2**53 + 1}}
    response = await client.json("/v1/eval/obedient", group)
    assert response.json == {
        "code": 0,
        "message": "a word",
        "result": {"uris": ["http://host/a", "qiniu://z0/bucket/b"], "group": True, "params": {"n": 2**53 + 1}},
    }


async def test_a_request_is_cancelled_when_its_caller_disconnects(net: Obedient, client: Client) -> None:
    asking = asyncio.create_task(client.json("/v1/eval/obedient", ask(hang=True)))
    await asyncio.wait_for(net.hanging.wait(), 30)
    asking.cancel()
    await asyncio.wait_for(net.cancelled.wait(), 30)


async def test_streams_and_codes_of_the_net_over_grpc(net: Obedient, mesh: Mesh) -> None:
    resource = serving_pb2.Resource(uri="http://host/a", attribute_json='{"a":1}')
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        request = serving_pb2.EvalRequest(app="obedient", data=[resource], params_json='{"stream": true}')
        assert (await stub.Eval(request)).stream == STREAM
        request.params_json = '{"code": -3, "status": 400}'
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Eval(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == 'the net said "no" ✗\n'
        trailers: Any = caught.value.trailing_metadata()
        assert dict(trailers)["x-serving-code"] == "-3"
        [item] = (await stub.Batch(serving_pb2.BatchRequest(tasks=[request]))).results
        assert (item.code, item.message) == (-3, 'the net said "no" ✗\n')


@pytest.mark.parametrize(("code", "status"), [(502, 502), (503, 503), (500, 500), (504, 504), (575, 575)])
async def test_an_error_of_the_net_is_not_retried(
    net: Obedient, mesh: Mesh, client: Client, code: int, status: int
) -> None:
    asked = net.asked
    assert (await client.json("/v1/eval/obedient", ask(code=code, status=status))).status == status
    assert net.asked == asked + 1
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        resource = serving_pb2.Resource(uri="http://host/a")
        request = serving_pb2.EvalRequest(
            app="obedient", data=[resource], params_json=f'{{"code": {code}, "status": {status}}}'
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await serving_pb2_grpc.ServingServiceStub(channel).Eval(request)
    assert net.asked == asked + 2
