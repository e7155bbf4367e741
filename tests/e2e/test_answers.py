"""What nets may answer, through gate and Envoy: streams, messages, and codes of their own.

The mesh is the real one; the instance is this test's, since no built-in net answers all of this.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import grpc.aio
import orjson
import pytest
import pytest_asyncio

from atserving import transport
from atserving.cli.mesh import Mesh
from atserving.v1 import (
    evaluator_pb2,
    evaluator_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    serving_pb2,
    serving_pb2_grpc,
)
from evaluator.serving.stream import GateStream
from tests.e2e.conftest import Client, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

STREAM = bytes(range(256)) * 100_000
Context = grpc.aio.ServicerContext[evaluator_pb2.ExchangeRequest, evaluator_pb2.ExchangeResponse]


class Obedient(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Answers what the request's params say."""

    def __init__(self) -> None:
        self.asked = 0
        self.hanging = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def GateStream(  # type: ignore[override]
        self, request_iterator: AsyncIterator[evaluator_pb2.ExchangeRequest], context: Context
    ) -> None:
        await GateStream(self._infer).run(request_iterator, context.write)

    async def _infer(self, call: evaluator_pb2.Call) -> evaluator_pb2.InferResponse:
        request = call.request
        self.asked += 1
        wish = orjson.loads(request.params_json or "{}")
        match wish:
            case {"stream": True}:
                return evaluator_pb2.InferResponse(stream=STREAM)
            case {"code": int(code), "status": int(status)}:
                error = evaluator_pb2.Error(code=code, status=status, message='the net said "no" ✗\n')
                return evaluator_pb2.InferResponse(error=error)
            case {"hang": True}:
                self.hanging.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
        seen = {"uris": [each.uri for each in request.data], "group": request.group, "params": wish}
        return evaluator_pb2.InferResponse(result_json=orjson.dumps(seen).decode(), message="a word")


@pytest_asyncio.fixture(loop_scope="session")
async def net(mesh: Mesh, client: Client) -> AsyncIterator[Obedient]:
    """The app `obedient`, whose one instance is in this process."""
    servicer, server = Obedient(), transport.Server([])
    evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(servicer, server.grpc)
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    instance = registry_pb2.Instance(app="obedient", version="v1", id="test", address=address, capacity=8)
    release = registry_pb2.Release(
        name="obedient", version="v1", file="file:///none", phase=registry_pb2.PHASE_PRODUCTION
    )
    async with transport.channel(mesh.registry) as channel:
        releases = registry_pb2_grpc.ReleaseServiceStub(channel)
        registry = registry_pb2_grpc.RegistryServiceStub(channel)
        await releases.PublishRelease(registry_pb2.PublishReleaseRequest(release=release))
        await registry.RegisterInstance(registry_pb2.RegisterInstanceRequest(instance=instance))

        async def serves() -> bool:
            return (await client.bytes("/v1/eval/obedient", b"x")).status == 200

        await until(serves, "the instance serves")
        yield servicer
        await registry.DeregisterInstance(registry_pb2.DeregisterInstanceRequest(instance=instance))
    await server.stop(0)


def ask(**params: object) -> dict[str, object]:
    return {"data": {"uri": "http://host/a"}, "params": params}


async def test_a_stream_is_the_bytes_as_they_are(net: Obedient, client: Client) -> None:
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


@pytest.mark.parametrize(("code", "status"), [(-1, 400), (-2, 500), (-3, 400), (422, 422), (575, 575), (599, 599)])
async def test_a_nets_own_code_is_in_the_body(net: Obedient, client: Client, code: int, status: int) -> None:
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


async def test_a_caller_that_hangs_up_takes_its_work_along(net: Obedient, client: Client) -> None:
    asking = asyncio.create_task(client.json("/v1/eval/obedient", ask(hang=True)))
    await asyncio.wait_for(net.hanging.wait(), 30)
    asking.cancel()
    await asyncio.wait_for(net.cancelled.wait(), 30)


async def test_the_same_by_grpc(net: Obedient, mesh: Mesh) -> None:
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
        assert dict(caught.value.trailing_metadata() or ())["x-serving-code"] == "-3"
        [item] = (await stub.Batch(serving_pb2.BatchRequest(tasks=[request]))).results
        assert (item.code, item.message) == (-3, 'the net said "no" ✗\n')


@pytest.mark.parametrize(("code", "status"), [(502, 502), (503, 503), (500, 500), (504, 504), (575, 575)])
async def test_what_a_net_answered_is_asked_once(
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
