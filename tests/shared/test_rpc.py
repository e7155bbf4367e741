"""Typed methods over our gRPC server, called by grpcio over real sockets, and as Envoy's transcoder calls them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest
from google.rpc import error_details_pb2, status_pb2

from atserving import rpc
from atserving.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from atserving.grpc_server import Server
from atserving.transport import channel
from atserving.v1 import registry_pb2, registry_pb2_grpc
from tests.shared.scripted_server import WAIT_S, method
from tests.waiting import until

SERVICE = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
PATH = "/atserving.v1.RegistryService/RegisterInstance"


class _Unknown(Exception):  # noqa: N818
    """An error of a library."""


@dataclass
class Servicer:
    """Answers by the app that the request names."""

    began: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    sent: int = 0

    async def report_comparisons(
        self, request: registry_pb2.ReportComparisonsRequest, _: rpc.Context
    ) -> registry_pb2.ReportComparisonsResponse:
        raise AssertionError

    async def register_instance(
        self, request: registry_pb2.RegisterInstanceRequest, context: rpc.Context
    ) -> registry_pb2.RegisterInstanceResponse:
        app = request.instance.app
        self.began.append(app)
        try:
            match app:
                case "fields":
                    raise InvalidArgument("two fields are wrong", fields={"a.b": "too long", "c": "no number"})
                case "many fields":
                    fields = {f"field{number}{'x' * 500}": "y" * 5000 for number in range(500)}
                    raise InvalidArgument("many are wrong", fields=fields)
                case "stale":
                    raise Aborted("it has changed")
                case "guarded":
                    raise FailedPrecondition("not now")
                case "busy":
                    raise Unavailable("later", retry_after_s=1.2)
                case "known":
                    raise _Unknown
                case "unknown":
                    raise ValueError("a secret")
                case "slow":
                    await asyncio.sleep(3600)
        finally:
            self.ended.append(app)
        return registry_pb2.RegisterInstanceResponse(ttl_ms=int(context.header("x-ttl") or 0))

    async def deregister_instance(
        self, request: registry_pb2.DeregisterInstanceRequest, _: rpc.Context
    ) -> registry_pb2.DeregisterInstanceResponse:
        return registry_pb2.DeregisterInstanceResponse()

    async def watch(
        self, request: registry_pb2.WatchRequest, _: rpc.Context
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        try:
            if request.app == "refused":
                raise InvalidArgument("no such app", fields={"app": "unknown"})
            for number in range(3 if request.app == "fails" else 1000):
                self.sent = number
                value = "x" * (100_000 if request.app == "large" else 1)
                yield registry_pb2.WatchResponse(revision=number, upserts=[registry_pb2.Entry(value_json=value)])
            raise Unavailable("the end")
        finally:
            self.ended.append("watch")


@asynccontextmanager
async def serving(observe: rpc.Observe = lambda *_: None) -> AsyncIterator[tuple[Servicer, Server, str]]:
    """Yield a servicer, its server and its address."""
    servicer, server = Servicer(), Server([SERVICE], 1 << 20)
    known = Unavailable("the library failed")
    rpc.serve(server, SERVICE, servicer, lambda error: known if isinstance(error, _Unknown) else None, observe=observe)
    port = await server.start("127.0.0.1:0")
    try:
        yield servicer, server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[Servicer, registry_pb2_grpc.RegistryServiceAsyncStub]]:
    """Yield a servicer and a stub of it."""
    async with serving() as (servicer, _, address), channel(address) as client:
        yield servicer, registry_pb2_grpc.RegistryServiceStub(client)


def request_for(app: str) -> registry_pb2.RegisterInstanceRequest:
    return registry_pb2.RegisterInstanceRequest(instance=registry_pb2.Instance(app=app))


async def failed(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_method_gets_its_request_and_the_headers() -> None:
    async with calling() as (_, stub):
        response = await stub.RegisterInstance(request_for("a"), metadata=(("x-ttl", "7"),), timeout=WAIT_S)
        assert response.ttl_ms == 7


@pytest.mark.parametrize(
    ("app", "code", "message"),
    [
        ("stale", grpc.StatusCode.ABORTED, "it has changed"),
        ("guarded", grpc.StatusCode.FAILED_PRECONDITION, "not now"),
        ("busy", grpc.StatusCode.UNAVAILABLE, "later"),
        ("known", grpc.StatusCode.UNAVAILABLE, "the library failed"),
        ("unknown", grpc.StatusCode.INTERNAL, "the server failed on this call"),
    ],
)
async def test_an_error_has_its_status(app: str, code: grpc.StatusCode, message: str) -> None:
    async with calling() as (_, stub):
        error = await failed(stub.RegisterInstance(request_for(app), timeout=WAIT_S))
        assert (error.code(), error.details()) == (code, message)


async def test_wrong_fields_are_named_in_the_details() -> None:
    async with calling() as (_, stub):
        error = await failed(stub.RegisterInstance(request_for("fields"), timeout=WAIT_S))
        details = next(value for name, value in error.trailing_metadata() if name == "grpc-status-details-bin")
        status = status_pb2.Status.FromString(details)
        assert (status.code, status.message) == (3, "two fields are wrong")
        refused = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(refused)
        named = [(each.field, each.description) for each in refused.field_violations]
        assert named == [("a.b", "too long"), ("c", "no number")]


async def test_many_wrong_fields_fit_into_the_headers() -> None:
    async with calling() as (_, stub):
        # Between 8 and 16 KiB, grpcio refuses headers by chance.
        for _ in range(20):
            error = await failed(stub.RegisterInstance(request_for("many fields"), timeout=WAIT_S))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_caller_who_leaves_ends_the_work() -> None:
    async with calling() as (servicer, stub):
        call = stub.RegisterInstance(request_for("slow"), timeout=WAIT_S)
        await until(lambda: servicer.began)
        call.cancel()
        await until(lambda: servicer.ended)


async def test_a_deadline_ends_the_work() -> None:
    async with calling() as (servicer, stub):
        error = await failed(stub.RegisterInstance(request_for("slow"), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: servicer.ended)


async def test_a_malformed_message_is_refused() -> None:
    async with serving() as (_, _, address), channel(address) as client:
        error = await failed(method(client, PATH)(b"\xff", timeout=WAIT_S))
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "the message is malformed")


async def test_a_stream_ends_with_its_error() -> None:
    async with calling() as (_, stub):
        call = stub.Watch(registry_pb2.WatchRequest(app="fails"), timeout=WAIT_S)
        responses: list[Any] = [await call.read() for _ in range(3)]
        assert [each.revision for each in responses] == [0, 1, 2]
        error = await failed(call.read())
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the end")


async def test_calls_are_observed_as_they_end() -> None:
    ended: list[tuple[str, int, float | None]] = []
    async with serving(lambda *one: ended.append(one)) as (servicer, _, address), channel(address) as client:
        stub = registry_pb2_grpc.RegistryServiceStub(client)
        await stub.RegisterInstance(request_for("a"), timeout=WAIT_S)
        for app in ("stale", "busy", "unknown"):
            await failed(stub.RegisterInstance(request_for(app), timeout=WAIT_S))
        await failed(method(client, PATH)(b"\xff", timeout=WAIT_S))
        call = stub.RegisterInstance(request_for("slow"), timeout=WAIT_S)
        await until(lambda: "slow" in servicer.began)
        call.cancel()
        await until(lambda: len(ended) == 6)
        assert [one[:2] for one in ended] == [("RegisterInstance", code) for code in (200, 409, 503, 500, 400, 499)]
        assert all(seconds is not None and 0 <= seconds < WAIT_S for _, _, seconds in ended)


async def test_streams_are_observed_as_they_end() -> None:
    ended: list[tuple[str, int, float | None]] = []
    async with serving(lambda *one: ended.append(one)) as (_, _, address), channel(address) as client:
        stub = registry_pb2_grpc.RegistryServiceStub(client)
        for app in ("refused", "fails"):
            call = stub.Watch(registry_pb2.WatchRequest(app=app), timeout=WAIT_S)
            with suppress(grpc.aio.AioRpcError):
                while await call.read():
                    pass
        call = stub.Watch(registry_pb2.WatchRequest(app="large"), timeout=WAIT_S)
        await call.read()
        call.cancel()
        await until(lambda: len(ended) == 3)
    assert ended == [("Watch", status, None) for status in (400, 503, 499)]


async def test_a_stream_waits_for_its_reader() -> None:
    async with calling() as (servicer, stub):
        call = stub.Watch(registry_pb2.WatchRequest(app="large"), timeout=WAIT_S)
        await call.read()
        seen = servicer.sent
        while seen < servicer.sent:
            seen = servicer.sent
            await asyncio.sleep(0.2)
        # 1,000 messages of 100 kB: the reader's window has taken a few.
        assert servicer.sent < 200
        call.cancel()
        await until(lambda: "watch" in servicer.ended)


async def test_a_stopping_server_ends_its_streams() -> None:
    async with serving() as (servicer, server, address), channel(address) as client:
        stub = registry_pb2_grpc.RegistryServiceStub(client)
        call = stub.Watch(registry_pb2.WatchRequest(app="large"), timeout=WAIT_S)
        await call.read()
        await server.stop(0)
        await until(lambda: "watch" in servicer.ended)


async def test_errors_over_rest_are_json() -> None:
    async with serving() as (_, _, address):
        status, headers, body = await post(address, PATH, request_for("fields").SerializeToString())
        assert (status, headers["content-type"]) == ("400", "application/json")
        assert orjson.loads(body) == {
            "code": 400,
            "message": "two fields are wrong",
            "fields": [{"field": "a.b", "reason": "too long"}, {"field": "c", "reason": "no number"}],
        }
        status, headers, body = await post(address, PATH, request_for("busy").SerializeToString())
        assert (status, headers["retry-after"]) == ("503", "2")
        status, _, body = await post(address, PATH, request_for("stale").SerializeToString())
        assert (status, orjson.loads(body)) == ("409", {"code": 409, "message": "it has changed"})


async def test_a_stream_over_rest_fails_as_json_too() -> None:
    async with serving() as (_, _, address):
        request = registry_pb2.WatchRequest(app="refused").SerializeToString()
        status, _, body = await post(address, "/atserving.v1.RegistryService/Watch", request)
        assert status == "400"
        assert orjson.loads(body)["fields"] == [{"field": "app", "reason": "unknown"}]


async def post(address: str, path: str, message: bytes) -> tuple[str, dict[str, str], bytes]:
    """Call a method as Envoy's transcoder does, by HTTP/2, and return the status, the headers and the body."""
    process = await asyncio.create_subprocess_exec(
        "curl",
        "--silent",
        "--include",
        "--http2-prior-knowledge",
        "--data-binary",
        "@-",
        "--header",
        "content-type: application/grpc",
        "--header",
        f"{rpc.REST_HEADER}: 1",
        f"http://{address}{path}",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    sent = len(message).to_bytes(5, "big") + message
    said, _ = await asyncio.wait_for(process.communicate(sent), WAIT_S)
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first.split()[1], dict(line.lower().split(": ", 1) for line in lines), body
