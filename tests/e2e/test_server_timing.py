"""A slow request explains itself: ``x-serving-timing: 1`` gives an answer ``server-timing``, through Envoy."""

from __future__ import annotations

import re

import grpc.aio
import pytest

from atserving import transport
from atserving.local.mesh import Mesh
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.e2e.client import UNUSED_PORT, Client, data_uri, image, padded

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

ASK = {"x-serving-timing": "1"}
_ENTRY = re.compile(r"(\w+);dur=(\d+(?:\.\d+)?)")


def read(value: str) -> dict[str, float]:
    """Return the milliseconds by the names of a ``server-timing``, in its order."""
    entries = [_ENTRY.fullmatch(entry) for entry in value.split(", ")]
    assert all(entries), value
    return {entry[1]: float(entry[2]) for entry in entries if entry}


async def test_an_answer_has_the_milliseconds_of_each_stage(client: Client) -> None:
    answer = await client.bytes("/v1/eval/digits", image("7.png"), **ASK)
    assert answer.status == 200
    found = read(answer.headers["server-timing"])
    assert list(found) == ["gate", "decode", "queue", "forward", "post", "total"]
    assert found["decode"] > 0
    assert found["forward"] > 0
    assert found["total"] == pytest.approx(sum(found.values()) - found["total"], abs=0.01)


async def test_a_resource_that_an_instance_fetches_is_a_stage(client: Client) -> None:
    answer = await client.json("/v1/eval/digits", {"data": client.uri("7.png")}, **ASK)
    found = read(answer.headers["server-timing"])
    assert list(found) == ["gate", "fetch", "decode", "queue", "forward", "post", "total"]
    assert found["fetch"] > 0


async def test_a_large_request_with_a_trace_has_it_too(client: Client) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=value"}
    answer = await client.bytes("/v1/eval/digits", padded(image("7.png"), 1 << 20), **ASK, **trace)
    assert (answer.status, answer.best) == (200, "seven")
    assert "forward" in read(answer.headers["server-timing"])


async def test_errors_say_how_far_they_came(client: Client) -> None:
    unfetched = {"data": {"uri": f"http://127.0.0.1:{UNUSED_PORT}/x"}}
    failed = await client.json("/v1/eval/digits/v1", unfetched, **ASK)
    assert failed.status == 502
    assert list(read(failed.headers["server-timing"])) == ["gate", "fetch", "total"]
    undecodable = await client.json("/v1/eval/digits", {"data": {"uri": "data:;base64,AAAA"}}, **ASK)
    assert undecodable.status == 400
    assert {"gate", "total"} <= read(undecodable.headers["server-timing"]).keys()
    for path in ("/v1/eval/unknown", "/v1/eval/digits/unknown"):
        unknown = await client.json(path, {"data": data_uri("7.png")}, **ASK)
        assert unknown.status == 404
        assert list(read(unknown.headers["server-timing"])) == ["total"]
    malformed = await client.json("/v1/eval/digits", 7, **ASK)
    assert malformed.status == 400
    assert list(read(malformed.headers["server-timing"])) == ["total"]


async def test_a_batch_has_its_total(client: Client) -> None:
    tasks = [{"op": "/v1/eval/digits", "data": data_uri("7.png")} for _ in range(3)]
    answer = await client.json("/v1/batch", tasks, **ASK)
    assert [each["code"] for each in answer.json] == [0, 0, 0]
    assert list(read(answer.headers["server-timing"])) == ["total"]


@pytest.mark.parametrize("headers", [{}, {"x-serving-timing": "0"}, {"x-serving-timing": "1" * 1000}])
async def test_nobody_gets_it_unasked(client: Client, headers: dict[str, str]) -> None:
    answer = await client.bytes("/v1/eval/digits", image("7.png"), **headers)
    assert answer.status == 200
    assert "server-timing" not in answer.headers


async def test_callers_of_grpc_get_it_in_the_metadata(mesh: Mesh) -> None:
    good = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=image("7.png"))])
    async with transport.channel(mesh.url.removeprefix("http://")) as channel:
        stub = serving_pb2_grpc.ServingServiceStub(channel)
        call = stub.Eval(good, metadata=tuple(ASK.items()))
        found = dict(await call.initial_metadata())
        await call
        assert "forward" in read(str(found["server-timing"]))
        batch = stub.Batch(serving_pb2.BatchRequest(tasks=[good, good]), metadata=tuple(ASK.items()))
        found = dict(await batch.initial_metadata())
        await batch
        assert list(read(str(found["server-timing"]))) == ["total"]
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Eval(serving_pb2.EvalRequest(app="unknown"), metadata=tuple(ASK.items()))
        trailing: dict[str, str | bytes] = dict(failed.value.trailing_metadata())  # type: ignore[arg-type]
        assert "total" in read(str(trailing["server-timing"]))
