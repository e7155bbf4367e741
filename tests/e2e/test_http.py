"""The HTTP API through the real Envoy: every row, every error, and the headers of every response."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import orjson
import pytest

from atserving import transport
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.e2e.client import JSON, UNUSED_PORT, Client, Response, data_uri, image, padded
from tests.processes import etcdctl
from tests.waiting import until_async

pytestmark = pytest.mark.asyncio(loop_scope="session")

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PUBLIC_HEADERS = {
    *("content-type", "content-length", "date", "server", "x-reqid", "x-serving-version", "retry-after", "allow"),
    *("www-authenticate", "ratelimit", "ratelimit-policy"),
    *("connection", "transfer-encoding"),
}


def check_error(response: Response, status: int, message: str = "", code: int | None = None) -> None:
    """Check an error response: the body of every error, the request id, and no internal header."""
    assert response.status == status, response.body
    assert response.headers["content-type"] == "application/json"
    assert response.json.keys() == {"code", "message"}
    assert response.json["code"] == (status if code is None else code)
    assert message in response.json["message"]
    assert response.headers["x-reqid"]
    check_headers(response)


def check_headers(response: Response) -> None:
    assert response.headers.keys() <= PUBLIC_HEADERS, response.headers


@pytest.mark.parametrize("digit", range(10))
async def test_an_image_as_bytes_is_classified(client: Client, digit: int) -> None:
    response = await client.bytes("/v1/eval/digits", image(f"{digit}.png"))
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-serving-version"] == "v1"
    check_headers(response)
    assert response.json["code"] == 0
    assert response.json["message"] == ""
    [best] = response.json["result"]["confidences"]
    assert (best["index"], best["class"]) == (digit, CLASSES[digit])
    assert 0.5 < best["score"] <= 1


@pytest.mark.parametrize("media_type", ["application/octet-stream", "image/png"])
async def test_an_image_as_a_data_uri_is_classified(client: Client, media_type: str) -> None:
    response = await client.json("/v1/eval/digits", {"data": data_uri("7.png", media_type)})
    assert (response.status, response.best) == (200, "seven")


@pytest.mark.parametrize("size", [40_000, 1_000_000])
@pytest.mark.parametrize("escaped", [False, True])
async def test_a_large_data_uri_is_classified(client: Client, size: int, escaped: bool) -> None:
    uri = b"data:image/png;base64," + base64.b64encode(padded(image("7.png"), size))
    uri = uri.replace(b"/", b"\\/") if escaped else uri
    document = b'{"params":{"limit":2},"data":{"attribute":{"any":"thing"},"uri":"%s"}}' % uri
    response = await client.post("/v1/eval/digits", document, JSON)
    assert (response.status, response.best) == (200, "seven")
    assert len(response.json["result"]["confidences"]) == 2
    batch = b'[{"op":"/v1/eval/digits","data":{"uri":"%s"}}]' % uri
    [item] = (await client.post("/v1/batch", batch, JSON)).json
    assert item["result"]["confidences"][0]["class"] == "seven"


async def test_an_image_with_an_http_url_is_classified(client: Client) -> None:
    response = await client.json("/v1/eval/digits", {"data": {**client.uri("3.png"), "attribute": {"any": ["thing"]}}})
    assert (response.status, response.best) == (200, "three")


async def test_a_named_version_answers_even_in_staging(client: Client) -> None:
    for version in ("v1", "v2"):
        response = await client.json(f"/v1/eval/digits/{version}", {"data": client.uri("4.png")})
        assert (response.status, response.best) == (200, "four")
        assert response.headers["x-serving-version"] == version
        response = await client.bytes(f"/v1/eval/digits/{version}", image("4.png"))
        assert (response.status, response.headers["x-serving-version"]) == (200, version)


async def test_integers_reach_the_net_as_integers(client: Client) -> None:
    request: dict[str, Any] = {"data": data_uri("7.png"), "params": {"limit": 3}}
    response = await client.json("/v1/eval/digits", request)
    scores = [each["score"] for each in response.json["result"]["confidences"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    check_error(await client.json("/v1/eval/digits", {**request, "params": {"limit": 3.0}}), 400, "limit")


async def test_unknown_fields_and_the_query_are_ignored(client: Client) -> None:
    request = {"data": {**data_uri("7.png"), "new": 1}, "newer": {}}
    response = await client.json("/v1/eval/digits?version=v2&body.data=x&other", request)
    assert (response.status, response.best, response.headers["x-serving-version"]) == (200, "seven", "v1")


async def test_a_net_for_single_images_rejects_a_group(client: Client) -> None:
    check_error(
        await client.json("/v1/eval/digits", {"data": [client.uri("1.png"), client.uri("2.png")]}), 400, "one image"
    )


async def test_a_batch_keeps_the_order_and_each_item_fails_by_itself(client: Client) -> None:
    tasks: list[Any] = [
        {"op": "/v1/eval/digits", "data": client.uri("1.png")},
        {"op": "/v1/eval/nothing", "data": client.uri("1.png")},
        {"op": "/v1/eval/digits/v2", "data": data_uri("2.png"), "params": {"limit": 2}},
        {"op": "/v1/eval/digits/v9", "data": client.uri("1.png")},
        {"op": "/v1/eval/digits", "data": client.uri("missing.png")},
        {"op": "/v1/eval/digits"},
        "rubbish",
        {"op": "/v1/eval/digits", "data": data_uri("3.png")},
    ]
    response = await client.json("/v1/batch", tasks)
    assert response.status == 200
    check_headers(response)
    items = response.json
    assert [each["code"] for each in items] == [0, 404, 0, 404, 400, 400, 400, 0]
    assert all(each["message"] for each in items if each["code"])
    best = [each["result"]["confidences"][0]["class"] for each in items if not each["code"]]
    assert best == ["one", "two", "three"]
    assert len(items[2]["result"]["confidences"]) == 2


async def test_a_batch_may_exceed_the_capacity_of_the_instance(client: Client) -> None:
    tasks = [{"op": "/v1/eval/digits", "data": data_uri(f"{n % 10}.png")} for n in range(200)]
    response = await client.json("/v1/batch", tasks)
    assert [each["result"]["confidences"][0]["index"] for each in response.json] == [n % 10 for n in range(200)]


async def test_a_malformed_batch_is_rejected_as_a_whole(client: Client) -> None:
    for body in (b"{}", b"[]", b"[1,", b""):
        check_error(await client.post("/v1/batch", body, JSON), 400)
    check_error(await client.json("/v1/batch", [1] * 1001), 413, "more than 1000 tasks")
    check_error(await client.bytes("/v1/batch", b"x"), 415)


async def test_a_malformed_request_is_a_400_with_the_reason(client: Client) -> None:
    async def refused(value: Any, message: str) -> None:
        check_error(await client.json("/v1/eval/digits", value), 400, message)

    check_error(await client.post("/v1/eval/digits", b'{"data":', JSON), 400, "malformed JSON")
    check_error(await client.post("/v1/eval/digits", b"", JSON), 400, "malformed JSON")
    check_error(await client.bytes("/v1/eval/digits", b""), 400, "empty")
    await refused({}, "missing required field `data`")
    await refused({"data": {"uri": "file:///etc/passwd"}}, "unsupported uri")
    await refused({"data": {"uri": "ftp://host/x"}}, "unsupported uri")
    await refused({"data": {"uri": "data:image/png;base64,!!!"}}, "not base64")
    await refused({"data": {"uri": "data:image/png,abc"}}, "base64")
    await refused({"data": client.uri("missing.png")}, "404")
    await refused({"data": {"uri": "http://169.254.169.254/latest/meta-data"}}, "not a public address")
    check_error(await client.bytes("/v1/eval/digits", b"this is no image"), 400, "image")
    check_error(await client.bytes("/v1/eval/digits", image("7.png")[:200]), 400, "image")


async def test_an_unreachable_resource_is_a_502(client: Client) -> None:
    uri = f"http://127.0.0.1:{UNUSED_PORT}/x.png"
    check_error(await client.json("/v1/eval/digits", {"data": {"uri": uri}}), 502)


async def test_an_unknown_app_version_or_path_is_a_404(client: Client) -> None:
    check_error(await client.bytes("/v1/eval/cats", b"x"), 404, "unknown app 'cats'")
    check_error(await client.bytes("/v1/eval/digits/v9", b"x"), 404, "no version 'v9'")
    check_error(await client.bytes("/v1/eval/digits%2Fv1", b"x"), 404)
    check_error(await client.bytes("/v1/eval/digits/v1/more", b"x"), 404, "unknown path")
    check_error(await client.bytes("/v1/eval", b"x"), 404, "unknown path")
    check_error(await client.get("/"), 404, "unknown path")
    check_error(await client.bytes("/atserving.v1.EdgeService/Eval", b"x"), 404, "unknown path")
    check_error(await client.bytes("/atserving.v1.ServingService/Eval", b"x"), 404, "unknown path")


async def test_a_wrong_method_is_a_405_that_names_the_right_one(client: Client) -> None:
    for path in ("/v1/eval/digits", "/v1/batch"):
        response = await client.get(path)
        check_error(response, 405)
        assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("content_type", ["text/plain", "image/png", "multipart/form-data", "application/jsonx"])
async def test_a_wrong_content_type_is_a_415(client: Client, content_type: str) -> None:
    response = await client.post("/v1/eval/digits", image("1.png"), {"content-type": content_type})
    check_error(response, 415, "content type")


async def test_an_error_says_which_version_was_asked(client: Client) -> None:
    """Errors before a version is chosen do not."""
    for path, version in (("/v1/eval/digits", "v1"), ("/v1/eval/digits/v2", "v2")):
        response = await client.bytes(path, b"this is no image")
        check_error(response, 400, "image")
        assert response.headers["x-serving-version"] == version
    response = await client.bytes("/v1/eval/digits/v9", b"x")
    check_error(response, 404)
    assert "x-serving-version" not in response.headers


async def test_a_host_with_a_control_character_is_a_400(client: Client) -> None:
    check_error(await client.json("/v1/eval/digits", {"data": {"uri": "http://ho\0st/"}}), 400, "bad url")


async def test_a_body_over_20_mib_is_a_413(client: Client) -> None:
    check_error(await client.bytes("/v1/eval/digits", bytes((20 << 20) + 1)), 413, "20 MiB")
    # A smaller body passes the edge and reaches the evaluator, which has a lower limit for one image.
    check_error(await client.bytes("/v1/eval/digits", bytes((20 << 20) - 1000)), 400, "larger than")


async def test_a_version_without_an_instance_is_a_503(client: Client) -> None:
    key = "/ava/serving/eval/lonely/v1"
    etcdctl(client.mesh.etcd, "put", key, '{"file": "file:///nowhere.tar", "phase": "production"}')

    async def known() -> bool:
        return (await client.bytes("/v1/eval/lonely", b"x")).status != 404

    await until_async(known, what="the gate knows the app")
    check_error(await client.bytes("/v1/eval/lonely", b"x"), 503, "no instance of app 'lonely' is ready")
    check_error(await client.bytes("/v1/eval/lonely/v1", b"x"), 503, "no instance of version 'v1'")
    etcdctl(client.mesh.etcd, "del", key)


async def test_a_private_app_is_a_401(client: Client) -> None:
    etcdctl(client.mesh.etcd, "put", "/ava/serving/app/metadata/digits", '{"public": false, "owner": {"uid": 7}}')

    async def private() -> bool:
        return (await client.bytes("/v1/eval/digits", image("1.png"))).status != 200

    await until_async(private, what="the gate knows that the app is private")
    check_error(await client.bytes("/v1/eval/digits", image("1.png")), 401, "not public")
    etcdctl(client.mesh.etcd, "del", "/ava/serving/app/metadata/digits")

    async def public() -> bool:
        return not await private()

    await until_async(public, what="the gate knows that the app is public again")


@pytest.mark.parametrize("size", [20_000, 40_000, 1_000_000, 9_000_000])
async def test_a_body_of_any_size_gives_the_same_answer(client: Client, size: int) -> None:
    picture = image("7.png")
    small = await client.bytes("/v1/eval/digits", picture)
    large = await client.bytes("/v1/eval/digits", padded(picture, size))
    assert (large.status, large.body) == (200, small.body)
    # No picture, to the end of a large body.
    check_error(await client.bytes("/v1/eval/digits", padded(picture, size)[:-20]), 400)
    check_error(await client.bytes("/v1/eval/cats", padded(picture, size)), 404)
    check_error(
        await client.post("/v1/eval/digits", padded(picture, size), {"content-type": "image/png"}), 415, "should be"
    )


async def test_a_request_past_its_apps_timeout_is_a_504(client: Client) -> None:
    settings = '{"timeout": "1ms", "delay4batch": "1s"}'
    etcdctl(client.mesh.etcd, "put", "/ava/serving/worker/app/digits/release/v2", settings)

    async def late() -> bool:
        return (await client.bytes("/v1/eval/digits/v2", image("1.png"))).status != 200

    await until_async(late, what="the gate knows the timeout")
    check_error(await client.bytes("/v1/eval/digits/v2", image("1.png")), 504, "did not answer within")
    assert (await client.bytes("/v1/eval/digits", image("1.png"))).status == 200
    batch = await client.json(
        "/v1/batch", [{"op": f"/v1/eval/digits/{version}", "data": data_uri("1.png")} for version in ("v2", "v1")]
    )
    assert [each["code"] for each in batch.json] == [504, 0]
    etcdctl(client.mesh.etcd, "del", "/ava/serving/worker/app/digits/release/v2")

    async def in_time() -> bool:
        return not await late()

    await until_async(in_time, what="the gate knows that the timeout was removed")


async def test_a_request_beyond_the_capacity_is_a_429_with_a_delay(client: Client) -> None:
    key = "/ava/serving/worker/app/digits/release/v2"
    etcdctl(client.mesh.etcd, "put", key, '{"max_concurrent": 1, "delay4batch": "300ms"}')
    refused: list[Response] = []

    async def full() -> bool:
        both = await asyncio.gather(*(client.bytes("/v1/eval/digits/v2", image("1.png")) for _ in range(4)))
        refused.extend(each for each in both if each.status != 200)
        return any(each.status == 200 for each in both) and bool(refused)

    await until_async(full, what="the instance rejects requests")
    for response in refused:
        check_error(response, 429)
        assert int(response.headers["retry-after"]) >= 1
    etcdctl(client.mesh.etcd, "del", key)

    async def roomy() -> bool:
        both = await asyncio.gather(*(client.bytes("/v1/eval/digits/v2", image("1.png")) for _ in range(4)))
        return all(each.status == 200 for each in both)

    await until_async(roomy, what="the instance accepts all requests again")


async def test_the_callers_request_id_is_in_the_response_and_in_every_log(client: Client) -> None:
    reqid = "My-id_42"
    response = await client.bytes("/v1/eval/digits", image("1.png"), **{"x-reqid": reqid, "traceparent": TRACE})
    assert response.headers["x-reqid"] == reqid
    for name in ("envoy", "gate", "evaluator-digits-v1"):

        async def logged(name: str = name) -> bool:
            return reqid in client.mesh.log(name)

        await until_async(logged, what=f"{name}'s log has the id")
        [line] = [orjson.loads(line) for line in client.mesh.log(name).splitlines() if reqid in line]
        assert (line["reqid"], line["code"] in (0, 200), line["traceparent"]) == (reqid, True, TRACE)


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_an_unreadable_request_is_logged(client: Client) -> None:
    for path, reqid in (("/v1/eval/digits", "unreadable-eval"), ("/v1/batch", "unreadable-batch")):
        check_error(await client.json(path, 7, **{"x-reqid": reqid}), 400)

        async def logged(reqid: str = reqid) -> bool:
            return reqid in client.mesh.log("gate")

        await until_async(logged, what="the gate has logged the request")
        [line] = [orjson.loads(line) for line in client.mesh.log("gate").splitlines() if reqid in line]
        assert (line["reqid"], line["code"]) == (reqid, 400)
        assert "malformed request" in line["reason"]


async def test_every_error_has_the_callers_request_id(client: Client) -> None:
    for path, body in (("/nothing", b""), ("/v1/eval/cats", b"x"), ("/v1/eval/digits", bytes((20 << 20) + 1))):
        assert (await client.bytes(path, body, **{"x-reqid": "my-id"})).headers["x-reqid"] == "my-id"


async def test_a_missing_or_malformed_request_id_is_replaced(client: Client) -> None:
    made = {
        (await client.bytes("/v1/eval/digits", image("1.png"), **given)).headers["x-reqid"]
        for given in ({}, {"x-reqid": "two words"}, {"x-reqid": "x" * 129}, {})
    }
    assert len(made) == 4
    assert all(each and len(each) <= 64 for each in made)


async def test_internal_headers_of_a_caller_are_ignored(client: Client) -> None:
    response = await client.bytes("/v1/eval/digits", image("1.png"), **{"x-serving-status": "201", "grpc-status": "3"})
    assert response.status == 200


async def test_health_is_200_while_the_edge_can_serve(client: Client) -> None:
    response = await client.get("/health")
    assert (response.status, response.json) == (200, {"code": 0, "message": ""})
    check_headers(response)


@pytest.mark.parametrize(
    "text",
    [b"RUBBISH\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: z\r\n\r\n"],
)
async def test_bytes_that_are_not_http_are_a_400(client: Client, text: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.mesh.ports.edge)
    writer.write(text)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 400")
    assert orjson.loads(body)["code"] == 400


async def test_http_1_0_is_served(client: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.mesh.ports.edge)
    body = image("6.png")
    head = ("POST /v1/eval/digits HTTP/1.0", "host: localhost", "content-type: application/octet-stream")
    writer.write("\r\n".join((*head, f"content-length: {len(body)}", "", "")).encode() + body)
    answer = await reader.read()
    writer.close()
    assert b" 200 OK" in answer
    assert b'"six"' in answer


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/eval/%ff%fe", {}, 404),
        ("/v1/eval/digits", {"cookie": "x" * 70_000}, 431),
        ("/v1/eval/digits", {"connection": "upgrade", "upgrade": "websocket"}, 403),
        ("/v1/eval/%00", {}, 400),
    ],
)
async def test_an_error_of_the_edge_has_the_body_of_every_error_and_a_request_id(
    client: Client, path: str, headers: dict[str, str], status: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.mesh.ports.edge)
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-length: 0",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    writer.write("\r\n".join((*lines, "connection: close", "", "")).encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\ncontent-type: application/json" in head
    assert b"\r\nx-reqid: " in head
    answer = orjson.loads(body)
    assert (answer["code"], bool(answer["message"])) == (status, True)


@pytest.mark.parametrize(
    "headers",
    [
        {"grpc-timeout": "x"},
        {"grpc-timeout": "1n"},
        {"grpc-encoding": "rubbish"},
        {"foo-bin": "!!!"},
        {"traceparent": "x" * 20_000},
        {"cookie": "x" * 30_000},
    ],
    ids=lambda headers: "".join(headers),
)
async def test_grpc_headers_of_an_http_caller_are_ignored(client: Client, headers: dict[str, str]) -> None:
    response = await client.bytes("/v1/eval/digits", image("7.png"), **headers)
    assert (response.status, response.best) == (200, "seven")


async def test_a_body_of_very_many_values_does_not_delay_other_requests(client: Client) -> None:
    tasks = b"[" + b'{"op":"/v1/eval/x"},' * 900_000 + b"1]"
    params = b'{"data":{"uri":"http://h"},"params":[' + b'{"a":[]},' * 2_000_000 + b"1]}"
    refused = asyncio.gather(client.post("/v1/batch", tasks, JSON), client.post("/v1/eval/digits", params, JSON))
    while not refused.done():
        response = await client.bytes("/v1/eval/digits", image("7.png"))
        assert response.status == 200
    batch, single = await refused
    check_error(batch, 413, "more than 1000 tasks")
    check_error(single, 400, "longer than")


async def test_huge_integers_and_deep_nesting_reach_the_net_or_fail_by_themselves(client: Client) -> None:
    op = b'{"op": "/v1/eval/digits", "data": {"uri": "%s"}, "params": %%s}' % data_uri("7.png")["uri"].encode()
    deep, deeper, too_deep = (b'{"any": ' + b"[" * depth + b"]" * depth + b"}" for depth in (127, 128, 100_000))
    params = (deep, deeper, b'{"any": 123456789012345678901234567890}', b'{"any": 1e999}', b'{"limit": 1}')
    response = await client.post("/v1/batch", b"[%s]" % b",".join(op % each for each in params), JSON)
    assert [each["code"] for each in response.json] == [0, 400, 0, 400, 0]
    assert response.json[1]["message"] == "params is nested more than 128 levels deep"
    assert response.json[3]["message"] == "params has a number beyond 1.8e+308"
    check_error(await client.post("/v1/eval/digits", op % too_deep, JSON), 400, "malformed JSON")


ROUTING = '{"aliases": {"next": "v2", "gone": "v9"}, "key_header": "x-user"}'


async def test_versions_take_turns_keep_keys_and_have_aliases(client: Client) -> None:
    etcd, release = client.mesh.etcd, "/ava/serving/eval/digits/v2"
    published = etcdctl(etcd, "get", "--print-value-only", release)
    promoted = {**orjson.loads(published), "phase": "production", "weight": 1}
    etcdctl(etcd, "put", "/ava/serving/app/routing/digits", ROUTING)
    etcdctl(etcd, "put", release, orjson.dumps(promoted).decode())

    async def versions(path: str = "/v1/eval/digits", count: int = 10, **headers: str) -> list[str]:
        answers = [await client.bytes(path, image("1.png"), **headers) for _ in range(count)]
        return [each.headers.get("x-serving-version", "") for each in answers]

    async def known(*expected: str) -> bool:
        return set(await versions("/v1/eval/digits/next", 1) + await versions(count=4)) == set(expected)

    await until_async(lambda: known("v1", "v2"), what="the gate knows the promotion and the aliases")
    assert sorted(await versions()) == ["v1"] * 5 + ["v2"] * 5
    assert await versions("/v1/eval/digits/next", 2) == ["v2", "v2"]
    check_error(
        await client.bytes("/v1/eval/digits/gone", image("1.png")), 404, "no version 'v9', which its alias 'gone' names"
    )

    of_keys = {
        key: set(await versions(count=4, **{"x-user": key})) for key in ("ann", "bob", "cy", "dee", "eve", "fay")
    }
    assert all(len(each) == 1 for each in of_keys.values())
    assert {version for each in of_keys.values() for version in each} == {"v1", "v2"}
    check_error(await client.bytes("/v1/eval/digits", image("1.png"), **{"x-user": "k" * 257}), 400, "longer than 256")

    # Versions differ in their answers' probabilities.
    one = {"data": data_uri("1.png")}
    by_version = {each: (await client.json(f"/v1/eval/digits/{each}", one)).json for each in ("v1", "v2")}
    assert by_version["v1"] != by_version["v2"]
    ops = ["/v1/eval/digits", "/v1/eval/digits/next", "/v1/eval/digits/v1"]
    for key, (version,) in of_keys.items():
        batch = await client.json("/v1/batch", [{"op": op, "data": data_uri("1.png")} for op in ops], **{"x-user": key})
        assert batch.json == [by_version[version], by_version["v2"], by_version["v1"]]

    async with transport.channel(f"127.0.0.1:{client.mesh.ports.edge}") as channel:
        stub: serving_pb2_grpc.ServingServiceAsyncStub = serving_pb2_grpc.ServingServiceStub(channel)
        data = [serving_pb2.Resource(body=image("1.png"))]
        for key, (version,) in of_keys.items():
            answer = await stub.Eval(serving_pb2.EvalRequest(app="digits", data=data), metadata=(("x-user", key),))
            assert answer.version == version
        assert (await stub.Eval(serving_pb2.EvalRequest(app="digits", version="next", data=data))).version == "v2"

    etcdctl(etcd, "put", release, published)
    etcdctl(etcd, "del", "/ava/serving/app/routing/digits")
    await until_async(lambda: known("", "v1"), what="the gate knows that all is as before")
