"""The operators' API through Envoy, REST and gRPC, on a mesh of real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import grpc.aio
import orjson
import pytest
import pytest_asyncio

from atserving import __version__
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.local import examples
from atserving.local.mesh import Mesh
from atserving.transport import channel
from tests.waiting import PATIENCE_S, until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

JSON = {"content-type": "application/json"}


@dataclass
class Answer:
    """An HTTP response."""

    status: int
    type: str
    json: Any


@dataclass
class Rest:
    """A client of the REST API."""

    mesh: Mesh
    session: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        data = body if isinstance(body, bytes | None) else orjson.dumps(body)
        sent = {**(JSON if body is not None else {}), **headers}
        url = f"http://127.0.0.1:{self.mesh.ports.operators}{path}"
        async with self.session.request(method, url, data=data, headers=sent) as response:
            return Answer(response.status, response.content_type, orjson.loads(await response.read()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh(serves=examples.DIGITS) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def rest(mesh: Mesh) -> AsyncIterator[Rest]:
    async with aiohttp.ClientSession() as session:
        yield Rest(mesh, session)


async def test_a_release_lives_and_dies_over_rest(rest: Rest) -> None:
    release = {"version": "v9", "file": "file:///m.tar", "custom_values": {"net": "classify", "limit": 3, "on": True}}
    made = await rest.call("POST", "/v1/apps/digits/releases", release)
    assert (made.status, made.type) == (200, "application/json")
    assert made.json["custom_values"] == release["custom_values"]
    assert made.json["phase"] == "PHASE_STAGING"
    found = await rest.call("GET", "/v1/apps/digits/releases/v9")
    assert found.json == made.json
    listed = await rest.call("GET", "/v1/apps/-/releases?filter=v9&page_size=5")
    assert listed.json == {"releases": [made.json]}
    changed = await rest.call("PATCH", "/v1/apps/digits/releases/v9?update_mask=desc", {"desc": "text"})
    assert changed.json["desc"] == "text"
    stale = await rest.call("DELETE", f"/v1/apps/digits/releases/v9?etag={made.json['etag']}")
    assert (stale.status, stale.json["code"]) == (409, 409)
    assert (await rest.call("DELETE", "/v1/apps/digits/releases/v9?message=a%20mistake")).status == 200
    assert (await rest.call("GET", "/v1/apps/digits/releases/v9")).status == 404
    history = await rest.call("GET", "/v1/apps/digits/history?page_size=3")
    assert [each["method"] for each in history.json["changes"]] == ["DeleteRelease", "UpdateRelease", "CreateRelease"]
    assert history.json["changes"][0]["message"] == "a mistake"


async def test_the_whole_config_over_rest(rest: Rest) -> None:
    found = await rest.call("GET", "/v1/apps/digits/config")
    assert "/ava/serving/eval/digits/v1" in found.json["values"]
    wanted = {"values": {"/ava/serving/worker/app/digits/default": '{"max_concurrent": 9}'}, "validate_only": True}
    planned = await rest.call("POST", "/v1/apps/digits/config:apply", wanted)
    assert planned.json["etag"] == found.json["etag"]
    assert [each["after"] for each in planned.json["changes"]] == ['{"max_concurrent":9}']
    stray = await rest.call("POST", "/v1/config:apply", wanted)
    assert (stray.status, "no config of the defaults" in stray.json["message"]) == (400, True)
    assert (await rest.call("GET", "/v1/config")).status == 200
    status = await rest.call("GET", "/v1/status")
    assert (status.status, status.json["software"], "stale" in status.json) == (200, __version__, False)


async def test_verbs_over_rest(rest: Rest) -> None:
    promoted = await rest.call("POST", "/v1/apps/digits/releases/v2:promote", {"exclusive": True, "actor": "ada"})
    assert promoted.json["phase"] == "PHASE_PRODUCTION"
    split = await rest.call("POST", "/v1/apps/digits:split", {"weights": {"v1": 3, "v2": 1}})
    assert [(each["version"], each["share"]) for each in split.json["shares"]] == [("v1", 0.75), ("v2", 0.25)]
    back = await rest.call("POST", "/v1/apps/digits:rollback", {})
    assert [each["version"] for each in back.json["shares"]] == ["v2"]
    refused = await rest.call("POST", "/v1/apps/digits/releases/v2:demote", {})
    assert (refused.status, refused.json["code"]) == (400, 400)
    assert "ready instance" in refused.json["message"]
    await rest.call("POST", "/v1/apps/digits/releases/v1:promote", {"exclusive": True})


@pytest.mark.parametrize("alias", ["stable", "Next-One", "a.b_c"])
async def test_an_alias_of_any_name(rest: Rest, alias: str) -> None:
    made = await rest.call("POST", f"/v1/apps/digits/aliases/{alias}", {"version": "v1"})
    assert made.json["aliases"] == {alias: "v1"}
    gone = await rest.call("DELETE", f"/v1/apps/digits/aliases/{alias}?etag={made.json['etag']}")
    assert "aliases" not in gone.json


async def test_settings_over_rest(rest: Rest) -> None:
    path = "/v1/apps/digits/releases/v1/worker"
    made = await rest.call(
        "PATCH", f"{path}?update_mask=max_concurrent,timeout", {"max_concurrent": 40, "timeout": "9s"}
    )
    assert (made.json["max_concurrent"], made.json["timeout"]) == (40, "9s")

    async def capacity() -> bool:
        listed = await rest.call("GET", "/v1/apps/digits/instances?version=v1")
        return [each["capacity"] for each in listed.json["instances"]] == [40]

    await until_async(capacity)
    merged = await rest.call("GET", f"{path}:merged")
    assert {each["name"]: each["level"] for each in merged.json["settings"]} == {
        "timeout": "LEVEL_VERSION",
        "max_concurrent": "LEVEL_VERSION",
        "delay4batch": "LEVEL_BUILT_IN",
        "fetch_allow": "LEVEL_BUILT_IN",
        "fetch_deny": "LEVEL_BUILT_IN",
        "scripts": "LEVEL_BUILT_IN",
        "wait_for_instance": "LEVEL_BUILT_IN",
    }
    assert (await rest.call("DELETE", path)).status == 200


async def test_instances_tell_how_they_run_and_their_load(rest: Rest) -> None:
    (one,) = (await rest.call("GET", "/v1/apps/digits/instances?version=v1&load=true")).json["instances"]
    assert one["plan"]["device"] == "CPU"
    assert one["plan"]["batch_size"] >= 1
    assert one["since"].startswith("20")
    assert "load" in one
    assert "unreachable" not in one


async def test_a_frozen_instance_is_listed_as_unreachable(rest: Rest) -> None:
    frozen = rest.mesh.pids()["evaluator-digits-v2"]
    os.kill(frozen, signal.SIGSTOP)
    try:
        listed = await rest.call("GET", "/v1/apps/digits/instances?load=true")
        by_version = {each["version"]: each for each in listed.json["instances"]}
        assert by_version["v2"]["unreachable"] == "does not answer"
        assert "load" in by_version["v1"]
    finally:
        os.kill(frozen, signal.SIGCONT)


async def test_a_watch_is_one_object_a_line(rest: Rest) -> None:
    url = f"http://127.0.0.1:{rest.mesh.ports.operators}/v1/apps/digits:watch"
    async with asyncio.timeout(PATIENCE_S), rest.session.get(url) as response:
        while not orjson.loads(await response.content.readline()).get("synced"):
            pass
        await rest.call("PATCH", "/v1/apps/digits/releases/v2", {"desc": "watched"})
        while (line := orjson.loads(await response.content.readline())).get("release", {}).get("desc") != "watched":
            pass
        assert line["release"]["version"] == "v2"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("GET", "/v1/apps/nothing", None, {}, 404, "unknown app"),
        ("GET", "/v1/apps/a%2fb", None, {}, 400, "app: "),
        ("GET", "/v1/nothing", None, {}, 404, ""),
        ("GET", "/", None, {}, 404, ""),
        ("GET", "/v1/apps?pagesize=3", None, {}, 400, "pagesize"),
        ("GET", "/v1/apps?page_size=-3", None, {}, 400, "page_size"),
        ("PUT", "/v1/apps/digits", {}, {}, 404, ""),
        ("PATCH", "/v1/apps/digits/worker", b'{"timeout":', {}, 400, "string"),
        ("PATCH", "/v1/apps/digits/worker", b'{"timeouts": "3s"}', {}, 400, "nothing to change"),
        (
            "PATCH",
            "/v1/apps/digits/worker",
            {"max_concurrent": 1},
            {"content-type": "text/plain"},
            415,
            "application/json",
        ),
        ("PATCH", "/v1/apps/digits/worker", {"max_concurrent": 1}, {"content-encoding": "gzip"}, 415, ""),
        ("POST", "/v1/apps/digits:split", b" " * (3 << 20), {}, 413, "2 MiB"),
        ("GET", "/v1/apps", None, {"host": "evil.example"}, 421, "answers only"),
    ],
)
async def test_every_error_is_json(
    rest: Rest, method: str, path: str, body: object, headers: dict[str, str], status: int, words: str
) -> None:
    answer = await rest.call(method, path, body, **headers)
    assert (answer.status, answer.type) == (status, "application/json")
    assert answer.json["code"] == status
    assert words in answer.json["message"]


async def test_a_wrong_field_is_named(rest: Rest) -> None:
    answer = await rest.call("POST", "/v1/apps/digits/releases", {"version": "v8", "file": "m.tar"})
    assert answer.json["fields"] == [{"field": "file", "reason": "should be a file, http, https or qiniu URI"}]


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("DELETE", "/v1/apps/digits/releases/v2?app=other", None, "app"),
        ("POST", "/v1/apps/digits/releases/v2:promote", {"version": "v1"}, "version"),
        ("PATCH", "/v1/apps/digits/access", {"app": "", "public": True}, "access.app"),
        ("PATCH", "/v1/apps/digits/access", {"app": "other", "public": True}, "access.app"),
        ("PATCH", "/v1/access", {"app": "digits", "public": True}, "access.app"),
        ("PATCH", "/v1/apps/digits/worker", {"version": "v1", "max_concurrent": 3}, "worker.version"),
        ("POST", "/v1/apps/digits/aliases/stable", {"alias": "other", "version": "v1"}, "alias"),
    ],
)
async def test_a_body_names_nothing_else_than_the_path(
    rest: Rest, method: str, path: str, body: object, field: str
) -> None:
    before = (await rest.call("GET", "/v1/apps/-/history?page_size=1")).json
    answer = await rest.call(method, path, body)
    assert (answer.status, answer.json["fields"]) == (400, [{"field": field, "reason": "differs from the path"}])
    assert (await rest.call("GET", "/v1/apps/-/history?page_size=1")).json == before


async def test_native_grpc_on_the_same_port(mesh: Mesh) -> None:
    async with channel(f"127.0.0.1:{mesh.ports.operators}") as client:
        stub = admin_pb2_grpc.AdminServiceStub(client)
        # A caller who claims to be Envoy's transcoder gets a gRPC error all the same.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetApp(admin_pb2.GetAppRequest(app="nothing"), metadata=(("x-atserving-rest", "1"),), timeout=9)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "unknown app 'nothing'")
        watch = stub.WatchApp(admin_pb2.WatchAppRequest(app="digits"), timeout=PATIENCE_S)
        response = await watch.read()
        assert isinstance(response, admin_pb2.WatchAppResponse)
        assert response.app.name == "digits"
        watch.cancel()


async def test_callers_cannot_reach_it(mesh: Mesh) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{mesh.url}/v1/apps") as response:
        assert response.status == 404
    async with channel(f"127.0.0.1:{mesh.ports.edge}") as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin_pb2_grpc.AdminServiceStub(client).ListApps(admin_pb2.ListAppsRequest(), timeout=9)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_without_a_registry_it_is_a_503(rest: Rest) -> None:
    await rest.mesh.stop_process("registry")
    try:
        answer = await rest.call("GET", "/v1/apps/digits")
        assert (answer.status, answer.json["code"]) == (503, 503)
        assert "no registry" in answer.json["message"]
    finally:
        rest.mesh.start_process("registry")

    async def answers() -> bool:
        return (await rest.call("GET", "/v1/apps/digits")).status == 200

    await until_async(answers)
