"""Envoy checks tokens, API keys, certificates and signatures, and a closed app admits those whom it names."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.local import envoy
from atserving.v1 import evaluator_pb2, registry_pb2, registry_pb2_grpc
from tests.e2e.callers import (
    ACCESS_KEY,
    API_KEY,
    AUTHORITY,
    BYTES,
    CALLER_KEYS,
    JSON,
    OWN,
    REMOTE,
    SECRET_KEY,
    SEVEN,
    TLS_ALONE,
    TYPED_BODY,
    TYPED_PATH,
    Answer,
    Authority,
    Certificate,
    Edge,
    documented,
    edge_for_all,
    forged_with_the_public_key,
    public_key,
    qiniu,
    token,
)
from tests.instance import ScriptedInstance
from tests.waiting import until, until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    async with edge_for_all(tmp_path_factory.mktemp("callers")) as edge:
        yield edge


MINE = AUTHORITY.caller("42", "vision")

Shown = tuple[dict[str, str], Certificate | None]
SCHEMES: dict[str, Callable[[str, str, str, bytes], Shown]] = {
    "a token": lambda *_: ({"authorization": f"Bearer {token(groups=['vision'])}"}, None),
    "a key": lambda *_: ({"x_api_key": API_KEY}, None),
    "a signature": lambda *signed: ({"authorization": qiniu(*signed)}, None),
    "a certificate": lambda *_: ({}, MINE),
}
"""How a caller shows that it is 42: the headers and the certificate, by path, host, content type and body."""


async def by_http(edge: Edge, kind: str, path: str = "/v1/eval/digits", body: bytes = SEVEN, of: str = BYTES) -> Answer:
    headers, certificate = SCHEMES[kind](path, edge.host, of, body)
    return await edge.http(path, body, certificate, content_type=of, **headers)


async def by_grpc(edge: Edge, kind: str) -> Answer:
    headers, certificate = SCHEMES[kind](TYPED_PATH, edge.host, "application/grpc", TYPED_BODY)
    return await edge.grpc("", certificate, **headers)


@pytest.mark.parametrize("kind", SCHEMES)
async def test_the_owner_may_use_a_closed_app(edge: Edge, kind: str) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    assert await by_http(edge, kind) == Answer(200)
    assert await by_grpc(edge, kind) == Answer(200)
    one = {"data": {"uri": f"{edge.mesh.files_url}/digits/images/7.png"}}
    assert await by_http(edge, kind, "/v1/eval/digits?q=1", json.dumps(one).encode(), JSON) == Answer(200)
    batch = json.dumps([{"op": "/v1/eval/digits", **one}])
    answer = await by_http(edge, kind, "/v1/batch", batch.encode(), JSON)
    assert (answer.status, json.loads(answer.message)[0]["code"]) == (200, 0)
    await edge.rules(public=False, owner={"uid": 43})
    assert (await by_http(edge, kind)).status == 403
    assert (await by_grpc(edge, kind)).status == 403


@pytest.mark.parametrize("kind", SCHEMES)
async def test_a_group_that_is_listed_may_use_it(edge: Edge, kind: str) -> None:
    await edge.rules(public=False, group_whitelist=["vision"])
    # An API key has no groups.
    expected = 403 if kind == "a key" else 200
    assert (await by_http(edge, kind)).status == (await by_grpc(edge, kind)).status == expected
    await edge.rules(public=False, group_whitelist=["visio", "dogs"])
    assert (await by_http(edge, kind)).status == (await by_grpc(edge, kind)).status == 403


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"uid": 7}, 200),
        ({"uid": 8}, 403),
        ({"uid": None, "groups": ["dogs", "vision"]}, 200),
        ({"uid": None, "groups": "vision"}, 200),
        ({"uid": 8, "groups": "dogs vision"}, 200),
        ({"uid": 8, "groups": ["vision team"]}, 403),
        ({"uid": None, "groups": []}, 403),
        ({"uid": "seven"}, 403),
        ({"uid": None}, 401),
    ],
    ids=str,
)
async def test_users_and_groups_that_are_listed_may_use_it(edge: Edge, claims: dict[str, Any], status: int) -> None:
    await edge.rules(user_whitelist=[7], group_whitelist=["vision"])
    assert (await edge.http(authorization=f"Bearer {token(**claims)}")).status == status


async def test_a_group_of_a_certificate_stands_for_no_list(edge: Edge) -> None:
    """Envoy passes a list of a token as JSON in base64, and a certificate may name a group that looks like one."""
    await edge.rules(public=False, group_whitelist=["vision"])
    named = base64.urlsafe_b64encode(b'["vision"]').decode().rstrip("=")
    answer = await edge.http("/v1/eval/digits", SEVEN, AUTHORITY.caller("8", named))
    assert answer.status == 403


async def test_who_says_nothing_is_told_what_to_show(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    message = "app 'digits' is not public, and the request carries no credentials"
    assert await edge.http() == await edge.grpc() == Answer(401, message, "Bearer, Qiniu")


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "expired": (lambda: token(exp=int(time.time()) - 120), "Jwt is expired"),
    "not yet valid": (lambda: token(nbf=int(time.time()) + 600), "Jwt not yet valid"),
    "signed by another": (lambda: token(OTHER), "Jwt verification fails"),
    "of another key": (lambda: token(OTHER, kid="other"), "Jwks doesn't have key to match kid or alg from Jwt"),
    "not signed": (lambda: token(None, "none"), "Jwt is not in the form of Header.Payload.Signature"),
    "signed with the public key": (forged_with_the_public_key, "Jwks doesn't have key to match kid or alg from Jwt"),
    "for another service": (lambda: token(aud="other"), "Audiences in Jwt are not allowed"),
    "without an end": (lambda: token(exp=None), "Jwt verification fails"),
    "of another issuer": (lambda: token(iss="https://else.example"), "Jwt issuer is not configured"),
    "no token": (lambda: "abc", "Jwt is not in the form of Header.Payload.Signature"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("public", [False, True])
async def test_a_bad_token_is_refused_with_its_reason(edge: Edge, kind: str, public: bool) -> None:
    await edge.rules(public=public)
    make, reason = BAD[kind]
    for call in (edge.http, edge.grpc):
        answer = await call(authorization=f"Bearer {make()}")
        assert answer.status == 401
        assert answer.message.startswith(reason)
    assert (await edge.http(authorization=f"Bearer {make()}")).challenge.startswith("Bearer")


async def test_the_keys_of_tokens_may_come_from_a_url(edge: Edge) -> None:
    """Envoy takes them from a host with the right certificate alone."""
    await edge.rules(public=False, owner={"uid": 42})
    folder = edge.mesh.directory / "envoy"
    files = {folder / name: (folder / name).read_text() for name in ("callers-jwt.yaml", "callers-hosts.yaml")}

    async def status(key: rsa.RSAPrivateKey, kid: str) -> int:
        return (await edge.http(authorization=f"Bearer {token(key, kid=kid)}")).status

    def write(path: Path, text: str) -> None:
        (folder / "new").write_text(text)
        os.replace(folder / "new", path)

    async def counted(name: str) -> bool:
        url = f"http://127.0.0.1:{edge.mesh.ports.ops}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            found = re.search(rf"{re.escape(name)} (\d+)", await response.text())
            return found is not None and int(found[1]) > 0

    asked = 0

    async def keys(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"keys": [public_key(OTHER, "other")]})

    @asynccontextmanager
    async def running(name: str, port: int) -> AsyncIterator[int]:
        app = web.Application()
        app.router.add_get("/jwks.json", keys)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        certificate = AUTHORITY.certified(x509.DNSName(name))
        path = folder / f"{name}.pem"
        path.write_bytes(certificate.certificate + certificate.key)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(path)
        try:
            await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    jwt, hosts = files
    hosts_text = (
        documented("issuer")
        .replace("address: id.example", "address: 127.0.0.1")
        .replace("/etc/ssl/certs/ca-certificates.crt", str(folder / "callers.crt"))
    )
    jwt_text = files[jwt].replace(f"local_jwks: {{filename: {folder}/jwks.json}}", REMOTE.strip())
    assert jwt_text != files[jwt]
    try:
        async with running("else.example", 0) as port:
            write(hosts, hosts_text.replace("port_value: 443", f"port_value: {port}"))
            write(jwt, jwt_text)

            async def is_refused() -> bool:
                assert await status(OTHER, "other") == 401
                return await counted('ssl_fail_verify_san{envoy_cluster_name="issuer"}')

            await until_async(is_refused)
            answer = await edge.http(authorization=f"Bearer {token(OTHER, kid='other')}")
            assert answer == Answer(401, "Jwks remote fetch is failed", answer.challenge)
            assert not asked
        async with running("id.example", port):

            async def is_known() -> bool:
                return await status(OTHER, "other") == 200

            await until_async(is_known)
            assert asked
            assert await status(OWN, "own") == 401
            # From its start on, Envoy asks by itself.
            write(jwt, jwt_text.replace("cache_duration: 300s", "cache_duration: 1s"))
            edge.mesh.kill_process("envoy")
            asked = 0
            await until(lambda: asked)
            await until_async(is_known, aiohttp.ClientError)

        await until_async(lambda: counted('jwks_fetch_failed{envoy_http_conn_manager_prefix="edge"}'))
        assert await status(OTHER, "other") == 200
    finally:
        for path, text in files.items():
            write(path, text)

        async def is_back() -> bool:
            return await status(OWN, "own") == 200

        await until_async(is_back)


@pytest.mark.parametrize("key", ["another-key-of-some-length", "", API_KEY[:-1], API_KEY.upper()])
async def test_a_wrong_key_is_refused(edge: Edge, key: str) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    for call in (edge.http, edge.grpc):
        answer = await call(x_api_key=key)
        assert (answer.status, answer.challenge) == (401, "ApiKey")


SIGNED_PATH = "/v1/eval/digits"
SIGNED_JSON = json.dumps({"data": {"uri": "data:;base64,eA=="}}).encode()
WRONG = "the signature does not match, or the access key is unknown"


def signed(edge: Edge, body: bytes = SIGNED_JSON, **changed: str) -> str:
    whole = {"path": SIGNED_PATH, "host": edge.host, "content_type": JSON, **changed}
    return qiniu(body=body, **whole)


BAD_SIGNATURES: dict[str, tuple[Callable[[Edge], str], str]] = {
    "by another key": (lambda edge: signed(edge, secret_key="another-key-of-some-length"), WRONG),
    "of another body": (lambda edge: signed(edge, SIGNED_JSON + b" "), WRONG),
    "of another path": (lambda edge: signed(edge, path="/v1/eval/other"), WRONG),
    "of another query": (lambda edge: signed(edge, path=f"{SIGNED_PATH}?limit=3"), WRONG),
    "of another host": (lambda edge: signed(edge, host="serving.example"), WRONG),
    "of another type": (lambda edge: signed(edge, content_type=BYTES), WRONG),
    "with a date that is not sent": (lambda edge: signed(edge, date="20261128T031500Z"), WRONG),
    "of an unknown caller": (lambda edge: signed(edge).replace(ACCESS_KEY, "somebody"), WRONG),
    "no signature": (lambda edge: f"Qiniu {ACCESS_KEY}", WRONG),
    "an empty signature": (lambda edge: f"Qiniu {ACCESS_KEY}:", WRONG),
    "a signature and more": (lambda edge: f"{signed(edge)}x", WRONG),
    "nothing": (lambda edge: "Qiniu  ", WRONG),
    "a word": (lambda edge: "QiniuStub uid=42&ut=1", "QiniuStub is not accepted from this peer"),
    "two": (lambda edge: f"{signed(edge)}, QiniuStub uid=42&ut=1", WRONG),
}


@pytest.mark.parametrize("kind", BAD_SIGNATURES)
@pytest.mark.parametrize("public", [False, True])
async def test_a_bad_signature_is_refused(edge: Edge, kind: str, public: bool) -> None:
    await edge.rules(public=public)
    make, reason = BAD_SIGNATURES[kind]
    answer = await edge.http(SIGNED_PATH, SIGNED_JSON, content_type=JSON, authorization=make(edge))
    assert answer == Answer(401, reason, "Qiniu")
    assert await edge.grpc(authorization=make(edge)) == Answer(401, reason, "Qiniu")


@pytest.mark.parametrize(
    "changed",
    [
        {"body": TYPED_BODY[:-1] + b"x"},
        {"body": TYPED_BODY[5:]},
        {"host": "serving.example"},
        {"path": "/atserving.v1.ServingService/Batch"},
        {"secret_key": "another-key-of-some-length"},
        {"access_key": "somebody"},
    ],
    ids=lambda changed: next(iter(changed)),
)
async def test_a_bad_signature_of_a_grpc_call_is_refused(edge: Edge, changed: dict[str, Any]) -> None:
    await edge.rules(public=True)
    whole: dict[str, Any] = {
        "path": TYPED_PATH,
        "host": edge.host,
        "content_type": "application/grpc",
        "body": TYPED_BODY,
    }
    assert await edge.grpc(authorization=qiniu(**whole)) == Answer(200)
    assert await edge.grpc(authorization=qiniu(**{**whole, **changed})) == Answer(401, WRONG, "Qiniu")


async def test_a_large_body_is_signed_too(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    body = SIGNED_JSON[:-1] + b" " * (4 << 20) + b"}"
    answer = await edge.http(SIGNED_PATH, body, content_type=JSON, authorization=signed(edge, body))
    assert answer.status == 400  # It has no image. The caller is known.
    refused = await edge.http(SIGNED_PATH, body + b" ", content_type=JSON, authorization=signed(edge, body))
    assert refused.status == 401
    too_large = body + b" " * (16 << 20)
    answer = await edge.http(SIGNED_PATH, too_large, content_type=JSON, authorization=signed(edge, too_large))
    assert answer == Answer(413, "the request's body is larger than 20 MiB")


@pytest.mark.parametrize(
    ("off_s", "status"), [(0, 200), (-800, 200), (800, 200), (-1000, 401), (1000, 401), (None, 401)]
)
async def test_a_signature_with_a_date_is_good_for_a_while(edge: Edge, off_s: float | None, status: int) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    date = "today" if off_s is None else time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + off_s))
    authorization = qiniu(SIGNED_PATH, edge.host, BYTES, SEVEN, date=date)
    assert (await edge.http(authorization=authorization, x_qiniu_date=date)).status == status
    # The date is part of what is signed.
    another = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + 60))
    assert (await edge.http(authorization=authorization, x_qiniu_date=another)).status == 401


async def test_gates_follow_the_file_of_keys(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    path = edge.mesh.directory / "envoy" / envoy.CALLER_KEYS_FILE

    async def write(**file: Any) -> None:
        path.with_suffix(".new").write_text(json.dumps(file))
        os.replace(path.with_suffix(".new"), path)

    word = {"authorization": "QiniuStub uid=42&ut=1"}
    for call in (edge.http, edge.grpc):
        await write(keys=[CALLER_KEYS], stub={"networks": ["127.0.0.0/8"]})
        assert (await call(**word)).status == 200
        assert (await call(authorization="QiniuStub uid=43")).status == 403
        for wrong in ("QiniuStub uid=42&uid=43", "QiniuStub ut=1", "QiniuStub uid=x", "QiniuStub x"):
            assert (await call(authorization=wrong)).status == 401
        await write(keys=[CALLER_KEYS], stub={"networks": ["10.0.0.0/8"]})
        assert (await call(**word)).status == 401
        assert (await call(**word, x_forwarded_for="10.1.1.1", x_envoy_external_address="10.1.1.1")).status == 401
        await write(keys=[CALLER_KEYS], stub={"peers": ["spiffe://company.example/caller/42"]})
        assert (await call(**word)).status == 401
    assert (await edge.http("/v1/eval/digits", SEVEN, MINE, authorization="QiniuStub uid=43")).status == 403
    assert (await edge.http("/v1/eval/digits", SEVEN, MINE, **word)).status == 200
    assert (await edge.grpc("", MINE, **word)).status == 200
    another = AUTHORITY.caller("43")
    assert (await edge.http("/v1/eval/digits", SEVEN, another, **word)).status == 401
    await write(keys=[CALLER_KEYS], require_date=True)
    assert (await edge.http(authorization=qiniu(SIGNED_PATH, edge.host, BYTES, SEVEN))).status == 401
    await write(keys=[CALLER_KEYS])
    assert (await edge.http(authorization=qiniu(SIGNED_PATH, edge.host, BYTES, SEVEN))).status == 200


async def test_no_caller_is_taken_for_nobody_if_no_gate_answers(edge: Edge) -> None:
    """An Envoy with another key than the gates' refuses who signs, and lets who shows nothing use what is public."""
    await edge.rules(public=True)
    path = edge.mesh.directory / "envoy" / "edge-key.yaml"
    right = path.read_text()

    async def write(text: str, status: int) -> None:
        path.with_suffix(".new").write_text(text)
        os.replace(path.with_suffix(".new"), path)

        async def follows() -> bool:
            return (await edge.http(authorization=qiniu(SIGNED_PATH, edge.host, BYTES, SEVEN))).status == status

        await until_async(follows)

    await write(right.replace(edge.edge_key, "another-key-of-more-than-32-characters"), 503)
    try:
        answer = Answer(503, "no gate could tell who the caller is")
        assert await edge.http(SIGNED_PATH, SIGNED_JSON, content_type=JSON, authorization=signed(edge)) == answer
        assert (await edge.grpc(authorization=signed(edge))).message == answer.message
        assert (await edge.http()).status == 200
        await until(lambda: "only Envoy may ask who a caller is" in edge.mesh.log("gate"))
    finally:
        await write(right, 200)


@pytest.mark.parametrize("kind", SCHEMES)
async def test_a_qiniu_uri_gets_the_callers_uid(edge: Edge, kind: str) -> None:
    async def echo(request: evaluator_pb2.InferRequest) -> evaluator_pb2.InferResponse:
        return evaluator_pb2.InferResponse(result_json=json.dumps([each.uri for each in request.data]))

    app = f"echo-{kind.rpartition(' ')[2]}"
    server = ScriptedInstance(echo, app, "v1", "test")
    address = (await server.start()).address
    instance = registry_pb2.Instance(app=app, version="v1", id="test", address=address, capacity=8)
    release = admin_pb2.Release(app=app, version="v1", file="file:///none", phase=admin_pb2.PHASE_PRODUCTION)
    path, body = f"/v1/eval/{app}", json.dumps({"data": {"uri": "qiniu://7@z0/bucket/key"}}).encode()
    async with transport.channel(edge.mesh.registry) as channel:
        operators = admin_pb2_grpc.AdminServiceStub(channel)
        await operators.CreateRelease(admin_pb2.CreateReleaseRequest(release=release))
        registry = registry_pb2_grpc.RegistryServiceStub(channel)
        await registry.RegisterInstance(registry_pb2.RegisterInstanceRequest(instance=instance))
        headers, certificate = SCHEMES[kind](path, edge.host, JSON, body)

        async def serves() -> bool:
            return (await edge.http(path, body, content_type=JSON)).status == 200

        await until_async(serves)
        assert await uris(edge, path, body) == ["qiniu://z0/bucket/key"]
        assert await uris(edge, path, body, certificate, **headers) == ["qiniu://42@z0/bucket/key"]
    await server.stop()


async def uris(edge: Edge, path: str, body: bytes, certificate: Certificate | None = None, **headers: str) -> Any:
    sent = {"content-type": JSON, **{name.replace("_", "-"): each for name, each in headers.items()}}
    url, tls = edge.url(certificate) + path, edge.tls(certificate)
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=sent, ssl=tls) as response:
        return (await response.json())["result"]


async def test_each_scheme_is_taken_for_itself(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    mine, others = signed(edge), f"Bearer {token(uid=7)}"
    # Of two in one header, the token alone counts.
    for both, status in ((f"{others}, {mine}", 401), (f"{mine}, {others}", 403)):
        answer = await edge.http(SIGNED_PATH, SIGNED_JSON, content_type=JSON, authorization=both)
        assert answer.status == status
    for other in ("Basic NDI6NDI=", "QiniuX a:b", "xQiniu a:b", "Bearer"):
        assert (await edge.http(authorization=other)).challenge == "Bearer, Qiniu"


async def test_what_the_request_shows_counts_more_than_its_connection(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    assert (await edge.http(SIGNED_PATH, SEVEN, MINE, authorization=f"Bearer {token(uid=7)}")).status == 403
    assert (await edge.http(SIGNED_PATH, SEVEN, AUTHORITY.caller("7"), x_api_key=API_KEY)).status == 200
    # A token without a uid does not get that of the certificate.
    groups = f"Bearer {token(uid=None, groups=['dogs'])}"
    assert (await edge.http(SIGNED_PATH, SEVEN, MINE, authorization=groups)).status == 403
    # Of a key and a token, the key says the uid.
    assert (await edge.http(x_api_key=API_KEY, authorization=f"Bearer {token(uid=7)}")).status == 200


UNKNOWN: dict[str, Certificate] = {
    "no certificate": TLS_ALONE,
    "no name": AUTHORITY.certified(),
    "the name of a host": AUTHORITY.certified(x509.DNSName("spiffe://company.example/caller/42")),
    "a name of another domain": AUTHORITY.certified(
        x509.UniformResourceIdentifier("spiffe://companyXexample/caller/42"),
    ),
    "a name with more": AUTHORITY.caller("42/admin"),
    "no number": AUTHORITY.caller("4x2"),
    "a group with a comma": AUTHORITY.certified(organizations=("dogs,vision", "dogs vision")),
}


@pytest.mark.parametrize("kind", UNKNOWN)
async def test_a_certificate_that_names_no_caller_helps_nobody(edge: Edge, kind: str) -> None:
    await edge.rules(public=False, owner={"uid": 42}, group_whitelist=["vision"])
    expected = 401 if kind == "no certificate" else 403
    assert (await edge.http("/v1/eval/digits", SEVEN, UNKNOWN[kind])).status == expected
    assert (await edge.grpc("", UNKNOWN[kind])).status == expected


BAD_CERTIFICATES = {
    "of another authority": Authority().caller("42"),
    "expired": AUTHORITY.caller("42", days=-1),
    "of a server": AUTHORITY.caller("42", usage=ExtendedKeyUsageOID.SERVER_AUTH),
}


@pytest.mark.parametrize("kind", BAD_CERTIFICATES)
async def test_a_bad_certificate_ends_the_connection(edge: Edge, kind: str) -> None:
    await edge.rules(public=True)
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await edge.http("/v1/eval/digits", SEVEN, BAD_CERTIFICATES[kind])
    assert (await edge.grpc("", BAD_CERTIFICATES[kind])).status == 500


async def test_a_certificate_may_be_required(edge: Edge) -> None:
    await edge.rules(public=True)
    path = edge.mesh.directory / "envoy" / "callers-certs.yaml"
    optional = path.read_text()

    async def write(text: str, status: int) -> None:
        path.with_suffix(".new").write_text(text)
        os.replace(path.with_suffix(".new"), path)

        async def follows() -> bool:
            return (await edge.http()).status == status

        await until_async(follows)

    await write(optional.replace("required = false", "required = true"), 401)
    try:
        for certificate in (None, TLS_ALONE):
            answer = await edge.http("/v1/eval/digits", SEVEN, certificate, authorization=f"Bearer {token()}")
            assert answer == Answer(401, "a certificate is required", "Certificate")
            assert await edge.grpc("", certificate) == answer
        assert (await edge.http("/v1/eval/digits", SEVEN, MINE)).status == 200
        assert (await edge.grpc("", MINE)).status == 200
        async with aiohttp.ClientSession() as session, session.get(f"{edge.mesh.url}/health") as response:
            assert response.status == 200
    finally:
        await write(optional, 200)


async def test_envoy_follows_the_files_of_tls(edge: Edge) -> None:
    await edge.rules(public=True)
    folder = edge.mesh.directory / "envoy"
    renewed = AUTHORITY.certified(x509.DNSName("localhost"))
    (folder / "renewed.crt").write_bytes(renewed.certificate)
    (folder / "renewed.key").write_bytes(renewed.key)

    def replace(name: str, old: str, new: str) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / "new").write_text(text.replace(old, new))
        os.replace(folder / "new", folder / name)

    async def shown() -> bytes:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", edge.mesh.ports.edge_tls, ssl=edge.tls(MINE), server_hostname="localhost"
        )
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return ssl.DER_cert_to_PEM_cert(certificate).encode()

    first = await shown()
    replace("edge-tls.yaml", "/tls.", "/renewed.")

    async def is_new() -> bool:
        return (await shown()).split() == renewed.certificate.split()

    await until_async(is_new)
    assert first.split() != renewed.certificate.split()
    # Of another authority from now on.
    other = Authority()
    (folder / "other.crt").write_bytes(other.certificate)
    theirs = other.caller("42")

    async def takes(certificate: Certificate) -> bool:
        try:
            return (await edge.http("/v1/eval/digits", SEVEN, certificate)).status == 200
        except (aiohttp.ClientError, ssl.SSLError, ConnectionError):
            return False

    replace("edge-clients.yaml", "/callers.crt", "/other.crt")
    await until_async(lambda: takes(theirs))
    assert not await takes(MINE)
    replace("edge-clients.yaml", "/other.crt", "/callers.crt")
    await until_async(lambda: takes(MINE))
    assert not await takes(theirs)


async def test_a_second_connection_of_a_session_shows_the_certificate_again(edge: Edge) -> None:
    """A client that offers its session gets a new one, and is known by its certificate."""
    await edge.rules(public=False, owner={"uid": 42})
    context = edge.tls(MINE)
    session: ssl.SSLSession | None = None
    for _ in range(2):
        with (
            socket.create_connection(("127.0.0.1", edge.mesh.ports.edge_tls), timeout=30) as raw,
            context.wrap_socket(raw, server_hostname="localhost", session=session) as tls,
        ):
            head = f"POST /v1/eval/digits HTTP/1.1\r\nhost: localhost\r\ncontent-type: {BYTES}\r\nconnection: close\r\n"
            tls.sendall(f"{head}content-length: {len(SEVEN)}\r\n\r\n".encode() + SEVEN)
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200")
            session = tls.session
            assert not tls.session_reused


async def test_the_access_log_says_who_called_from_where(edge: Edge) -> None:
    await edge.rules(public=True)
    await edge.http("/v1/eval/digits", SEVEN, MINE, x_reqid="the-certified")
    await edge.http("/v1/eval/digits", SEVEN, TLS_ALONE, x_reqid="the-unknown", x_forwarded_for="10.1.1.1")

    def logged(reqid: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in edge.mesh.log("envoy").splitlines() if f'"{reqid}"' in line]

    await until(lambda: bool(logged("the-certified") and logged("the-unknown")))
    for reqid, uid in (("the-certified", "42"), ("the-unknown", None)):
        (line,) = logged(reqid)
        assert (line["address"], line["uid"]) == ("127.0.0.1", uid)


async def test_refusal_of_a_signature_has_the_id_of_its_trace(edge: Edge) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    bad = signed(edge, secret_key="another-key-of-some-length")
    headers = {"authorization": bad, "traceparent": f"00-{trace}-b7ad6b7169203331-01", "x_reqid": "the-refused"}
    assert (await edge.http(SIGNED_PATH, SIGNED_JSON, content_type=JSON, **headers)).status == 401

    def logged() -> list[dict[str, Any]]:
        return [json.loads(line) for line in edge.mesh.log("gate").splitlines() if '"the-refused"' in line]

    await until(lambda: bool(logged()))
    (line,) = logged()
    assert (line["event"], line["code"], line["trace_id"]) == ("request rejected", 401, trace)


async def test_a_caller_has_limits(edge: Edge) -> None:
    await edge.rules(public=False)
    await edge.rules(public=True, max_requests_per_second=0.001)
    mine = {"authorization": f"Bearer {token(uid=99)}"}
    assert (await edge.http(**mine)).status == 200
    async with aiohttp.ClientSession() as session:
        sent = {"content-type": "application/octet-stream", **mine}
        async with session.post(f"{edge.mesh.url}/v1/eval/digits", data=SEVEN, headers=sent) as response:
            assert response.status == 429
            assert int(response.headers["retry-after"]) > 900
            assert response.headers["ratelimit-policy"] == '"requests";q=1;w=1000'
            assert response.headers["ratelimit"] == f'"requests";r=0;t={response.headers["retry-after"]}'
    # Over gRPC it is the same caller; another one has limits of their own.
    assert (await edge.grpc(**mine)).message.startswith("this caller sends app 'digits' more than 0.001 requests")
    assert (await edge.http(authorization=f"Bearer {token(uid=98)}")).status == 200


async def test_no_secret_is_shown(edge: Edge) -> None:
    bearer = token()
    await edge.http(authorization=f"Bearer {bearer}", x_api_key=API_KEY)
    signature = qiniu(SIGNED_PATH, edge.host, BYTES, SEVEN)
    await edge.http(authorization=signature)
    await edge.http(authorization=f"{signature}x")
    private = (edge.mesh.directory / "envoy" / "tls.key").read_text().splitlines()[1]
    admin = str(edge.mesh.directory / envoy.ADMIN_SOCKET)
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(admin)) as session,
        session.get("http://localhost/config_dump?include_eds") as response,
    ):
        shown = await response.text()
    assert "x-serving-uid" in shown
    shown += "".join(path.read_text(errors="replace") for path in edge.mesh.directory.glob("*.log"))
    for secret in (edge.edge_key, API_KEY, SECRET_KEY, private, bearer, signature):
        assert secret not in shown
