"""The gRPC API, through Envoy and at the gate itself; health and reflection of every service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.local.mesh import Mesh
from atserving.v1 import edge_pb2, edge_pb2_grpc, serving_pb2, serving_pb2_grpc
from tests.e2e.client import data_uri, image, padded
from tests.processes import etcdctl
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="session")

LARGE = padded(image("7.png"), 300_000)


@pytest_asyncio.fixture(loop_scope="session", params=["edge", "gate"])
async def channel(request: pytest.FixtureRequest, mesh: Mesh) -> AsyncIterator[grpc.aio.Channel]:
    port = mesh.ports.edge if request.param == "edge" else mesh.ports.gates[0]
    async with transport.channel(f"127.0.0.1:{port}") as channel:
        yield channel


@pytest.fixture
def serving(channel: grpc.aio.Channel) -> serving_pb2_grpc.ServingServiceAsyncStub:
    return serving_pb2_grpc.ServingServiceStub(channel)


def request(digit: int, **fields: Any) -> serving_pb2.EvalRequest:
    resource = serving_pb2.Resource(body=image(f"{digit}.png"))
    return serving_pb2.EvalRequest(**{"app": "digits", **fields}, data=[resource])


async def test_eval_returns_the_version_and_the_callers_request_id(
    serving: serving_pb2_grpc.ServingServiceAsyncStub,
) -> None:
    for version, answered in (("", "v1"), ("v1", "v1"), ("v2", "v2")):
        call = serving.Eval(request(7, version=version), metadata=(("x-reqid", "mine"),))
        response = await call
        assert (response.code, response.version) == (0, answered)
        assert '"seven"' in response.result_json
        metadata = dict(await call.initial_metadata())
        assert (metadata["x-reqid"], metadata["x-serving-version"]) == ("mine", answered)


async def test_eval_accepts_uris_and_params(serving: serving_pb2_grpc.ServingServiceAsyncStub) -> None:
    resource = serving_pb2.Resource(uri=data_uri("5.jpg")["uri"], attribute_json="[1]")
    response = await serving.Eval(serving_pb2.EvalRequest(app="digits", data=[resource], params_json='{"limit": 2}'))
    assert response.result_json.count('"class"') == 2


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"app": "cats"}, grpc.StatusCode.NOT_FOUND, "404"),
        ({"version": "v9"}, grpc.StatusCode.NOT_FOUND, "404"),
        ({"params_json": '{"limit": "x"}'}, grpc.StatusCode.INVALID_ARGUMENT, "400"),
        ({"params_json": "not json"}, grpc.StatusCode.INVALID_ARGUMENT, "400"),
    ],
)
async def test_a_failure_is_a_status_with_the_code_and_the_request_id(
    serving: serving_pb2_grpc.ServingServiceAsyncStub, fields: dict[str, str], status: grpc.StatusCode, code: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.Eval(request(1, **fields), metadata=(("x-reqid", "mine"),))
    assert caught.value.code() is status
    trailers: Any = caught.value.trailing_metadata()
    metadata = dict(trailers)
    assert (metadata["x-serving-code"], metadata["x-reqid"]) == (code, "mine")


async def test_a_failure_says_which_version_was_asked(serving: serving_pb2_grpc.ServingServiceAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.Eval(request(1, params_json="not json"))
    trailers: Any = caught.value.trailing_metadata()
    assert dict(trailers)["x-serving-version"] == "v1"


async def test_a_compressed_message_is_unimplemented(serving: serving_pb2_grpc.ServingServiceAsyncStub) -> None:
    large = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=LARGE)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.Eval(large, compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "fields", [{}, {"params_json": '{"limit": 1}'}, {"data": [serving_pb2.Resource(body=LARGE, attribute_json="1")]}]
)
async def test_a_large_body_gives_the_answer_of_a_small_one(
    serving: serving_pb2_grpc.ServingServiceAsyncStub, fields: dict[str, Any]
) -> None:
    small = await serving.Eval(request(7))
    given = {"app": "digits", "data": [serving_pb2.Resource(body=LARGE)]}
    large = await serving.Eval(serving_pb2.EvalRequest(**{**given, **fields}))
    assert large == small
    for missing in ({"app": "cats"}, {"version": "v9"}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await serving.Eval(serving_pb2.EvalRequest(**{**given, **fields, **missing}))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    # A net that takes one picture refuses two.
    two = [serving_pb2.Resource(body=image("7.png")), serving_pb2.Resource(body=LARGE)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.Eval(serving_pb2.EvalRequest(app="digits", data=two))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_fields_in_another_order_than_usual_count_too(
    channel: grpc.aio.Channel, serving: serving_pb2_grpc.ServingServiceAsyncStub
) -> None:
    head = serving_pb2.EvalRequest(app="digits", params_json='{"limit": 3}').SerializeToString()
    body = serving_pb2.EvalRequest(data=[serving_pb2.Resource(body=LARGE)]).SerializeToString()
    method = channel.unary_unary("/atserving.v1.ServingService/Eval", None, serving_pb2.EvalResponse.FromString)
    assert (await method(head + body)).result_json.count('"class"') == 3


async def test_the_callers_deadline_limits_the_call(
    serving: serving_pb2_grpc.ServingServiceAsyncStub, mesh: Mesh
) -> None:
    key = "/ava/serving/worker/app/digits/release/v2"

    async def in_time() -> bool:
        try:
            await serving.Eval(request(1, version="v2"), timeout=0.2)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            return False
        return True

    async def late() -> bool:
        return not await in_time()

    etcdctl(mesh.etcd, "put", key, '{"delay4batch": "2s"}')
    await until_async(late, what="the instance waits longer for a batch than the caller")
    etcdctl(mesh.etcd, "del", key)
    await until_async(in_time, what="the instance waits no more")


async def test_a_batch_returns_its_results_in_order(serving: serving_pb2_grpc.ServingServiceAsyncStub) -> None:
    tasks = [request(1), request(2, app="cats"), request(3, version="v2")]
    call = serving.Batch(serving_pb2.BatchRequest(tasks=tasks), metadata=(("x-reqid", "mine"),))
    results = (await call).results
    assert [(each.code, each.version) for each in results] == [(0, "v1"), (404, ""), (0, "v2")]
    assert '"three"' in results[2].result_json
    assert dict(await call.initial_metadata())["x-reqid"] == "mine"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await serving.Batch(serving_pb2.BatchRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_concurrent_calls_share_a_connection(serving: serving_pb2_grpc.ServingServiceAsyncStub) -> None:
    results = await asyncio.gather(*(serving.Eval(request(n % 10)) for n in range(48)))
    assert [each.result_json.count('"class"') for each in results] == [1] * 48


async def test_callers_cannot_reach_the_edge_service(mesh: Mesh) -> None:
    async with transport.channel(f"127.0.0.1:{mesh.ports.edge}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge_pb2_grpc.EdgeServiceStub(channel).Eval(edge_pb2.EdgeEvalRequest(app="digits"))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def addresses(mesh: Mesh) -> list[str]:
    async with transport.channel(mesh.registry) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        listed = await stub.ListInstances(admin_pb2.ListInstancesRequest(app="digits"))
    evaluators = [instance.address for instance in listed.instances]
    assert len(evaluators) == 2
    return [f"127.0.0.1:{mesh.ports.edge}", f"127.0.0.1:{mesh.ports.gates[0]}", mesh.registry, *evaluators]


async def test_every_service_has_health_and_reflection(mesh: Mesh) -> None:
    for address in await addresses(mesh):
        async with transport.channel(address) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
            names = [service.name async for reply in call for service in reply.list_services_response.service]
            assert any(name.startswith("atserving.v1.") for name in names), names
            assert "atserving.v1.EdgeService" not in names
            assert "grpc.health.v1.Health" in names


@pytest.mark.parametrize("program", ["gate", "registry"])
async def test_an_unavailable_listen_address_is_one_line_on_stderr(mesh: Mesh, program: str) -> None:
    registry = "--registry" if program == "gate" else "--etcd"
    run = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", program, registry, mesh.registry, "--listen", "192.0.2.1:1", "--insecure"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await run.communicate()
    assert run.returncode == 1
    expected = f"{program}: cannot listen on 192.0.2.1:1: the address is not this machine's"
    assert errors.decode().splitlines()[-1] == expected
