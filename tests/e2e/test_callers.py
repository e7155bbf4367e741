"""Envoy checks tokens and API keys, a closed app admits those whom it names, and an outsider gets nowhere."""

from __future__ import annotations

import json
import socket
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from atserving import transport
from atserving.local import envoy, examples
from atserving.local.examples import FOLDER, ROOT
from atserving.local.mesh import Mesh
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.processes import etcdctl
from tests.waiting import until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SEVEN = (FOLDER / "digits" / "images" / "7.png").read_bytes()
OWN = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
API_KEY = "an-api-key-of-some-length"


def documented(name: str) -> str:
    """Return the file of Envoy with this name, as docs/callers.md shows it."""
    for block in (ROOT / "docs" / "callers.md").read_text().split("\n    resources:\n")[1:]:
        text = textwrap.dedent("    resources:\n" + block.partition("\n\n")[0])
        if f"name: {name}\n" in text:
            return text
    raise AssertionError(f"docs/callers.md has no {name}")


def token(key: Any = OWN, algorithm: str = "RS256", kid: str = "own", **claims: Any) -> str:
    known = {"iss": "https://id.example", "aud": "serving", "uid": 42, "exp": int(time.time()) + 600}
    payload = {name: value for name, value in {**known, **claims}.items() if value is not None}
    return jwt.encode(payload, key, algorithm=algorithm, headers={"kid": kid})


def forged_with_the_public_key() -> str:
    """As if a server took the algorithm from the token: signed with HMAC, and the public key as its secret."""
    public = OWN.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head, body = (
        jwt.utils.base64url_encode(json.dumps(each).encode())
        for each in (
            {"alg": "HS256", "typ": "JWT", "kid": "own"},
            {"iss": "https://id.example", "aud": "serving", "uid": 42, "exp": int(time.time()) + 600},
        )
    )
    signed = jwt.utils.base64url_encode(
        jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(head + b"." + body, public)
    )
    return b".".join((head, body, signed)).decode()


@dataclass
class Answer:
    """The answer to a caller, over HTTP or gRPC."""

    status: int
    message: str = ""
    challenge: str = ""


class Edge:
    """Calls the app `digits` at Envoy, or at a gate directly."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    async def http(self, path: str = "/v1/eval/digits", body: bytes = SEVEN, /, **headers: str) -> Answer:
        sent = {
            "content-type": "application/octet-stream",
            **{name.replace("_", "-"): each for name, each in headers.items()},
        }
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.mesh.url + path, data=body, headers=sent) as response,
        ):
            document = await response.json(content_type=None)
            message = document["message"] if isinstance(document, dict) else json.dumps(document)
            return Answer(response.status, message, response.headers.get("www-authenticate", ""))

    async def grpc(self, address: str = "", /, **headers: str) -> Answer:
        request = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=SEVEN)])
        metadata = [(name.replace("_", "-"), value) for name, value in headers.items()]
        async with transport.channel(address or self.mesh.url.removeprefix("http://")) as channel:
            try:
                await serving_pb2_grpc.ServingServiceStub(channel).Eval(request, metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                statuses = {grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403}
                return Answer(statuses.get(error.code(), 500), error.details() or "")
            return Answer(200)

    async def gate(self, **headers: str) -> Answer:
        return await self.grpc(f"127.0.0.1:{self.mesh.ports.gates[0]}", **headers)

    async def rules(self, **rules: Any) -> None:
        """Set who may call; wait until the gate follows."""
        etcdctl(self.mesh.etcd, "put", "/ava/serving/app/metadata/digits", json.dumps(rules))
        wanted = 200 if rules.get("public") else 401

        async def follows() -> bool:
            return (await self.http()).status == wanted

        await until_async(follows)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Edge]:
    folder: Path = tmp_path_factory.mktemp("callers")
    public = {**json.loads(RSAAlgorithm.to_jwk(OWN.public_key())), "kid": "own", "alg": "RS256", "use": "sig"}
    (folder / "jwks.json").write_text(json.dumps({"keys": [public]}))
    (folder / "callers-jwt.yaml").write_text(documented("callers-jwt"))
    keys = documented("callers-keys").replace("a long random text", API_KEY)
    assert API_KEY in keys
    (folder / "callers-keys.yaml").write_text(keys)
    async with Mesh(serves=examples.DIGITS, callers=folder) as mesh:
        yield Edge(mesh)


CREDENTIALS: dict[str, Callable[[], dict[str, str]]] = {
    "a token": lambda: {"authorization": f"Bearer {token()}"},
    "a key": lambda: {"x_api_key": API_KEY},
}


@pytest.mark.parametrize("kind", CREDENTIALS)
async def test_the_owner_may_use_a_closed_app(edge: Edge, kind: str) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    assert await edge.http(**CREDENTIALS[kind]()) == Answer(200)
    assert await edge.grpc(**CREDENTIALS[kind]()) == Answer(200)
    batch = json.dumps([{"op": "/v1/eval/digits", "data": {"uri": f"{edge.mesh.files_url}/digits/images/7.png"}}])
    answer = await edge.http("/v1/batch", batch.encode(), content_type="application/json", **CREDENTIALS[kind]())
    assert (answer.status, json.loads(answer.message)[0]["code"]) == (200, 0)
    await edge.rules(public=False, owner={"uid": 43})
    assert (await edge.http(**CREDENTIALS[kind]())).status == 403
    assert (await edge.grpc(**CREDENTIALS[kind]())).status == 403


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


async def test_who_says_nothing_is_told_what_to_show(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    message = "app 'digits' is not public, and the request carries no credentials"
    assert await edge.http() == Answer(401, message, "Bearer")
    assert await edge.grpc() == Answer(401, message)


SPOOFED = ({"x_serving_uid": "42"}, {"x_serving_uid": "42", "x_serving_edge": "none"}, {"x_serving_groups": "vision"})


@pytest.mark.parametrize("headers", SPOOFED, ids=str)
async def test_nobody_says_who_they_are_by_themselves(edge: Edge, headers: dict[str, str]) -> None:
    await edge.rules(public=False, owner={"uid": 42}, group_whitelist=["vision"])
    for call in (edge.http, edge.grpc, edge.gate):
        assert (await call(**headers)).status == 401
    # With credentials of their own, which are those of somebody else.
    mine = token(uid=7, groups=["dogs"])
    assert (await edge.http(authorization=f"Bearer {mine}", **headers)).status == 403
    assert (await edge.grpc(authorization=f"Bearer {mine}", **headers)).status == 403


@pytest.mark.parametrize("name", ["X-Serving-Uid", "x_serving_uid", "x-serving-uid "])
async def test_no_spelling_of_the_header_passes(edge: Edge, name: str) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    head = (
        f"POST /v1/eval/digits HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n{name}: 42\r\n"
    )
    with socket.create_connection(("127.0.0.1", edge.mesh.ports.edge), timeout=30) as raw:
        raw.sendall(f"{head}{name}: 42\r\nconnection: close\r\ncontent-length: {len(SEVEN)}\r\n\r\n".encode() + SEVEN)
        status = int(raw.makefile("rb").readline().split()[1])
    assert status in (400, 401)


BAD: dict[str, tuple[Callable[[], str], str]] = {
    "expired": (lambda: token(exp=int(time.time()) - 120), "Jwt is expired"),
    "not yet valid": (lambda: token(nbf=int(time.time()) + 600), "Jwt not yet valid"),
    "signed by another": (lambda: token(OTHER), "Jwt verification fails"),
    "of another key": (lambda: token(OTHER, kid="other"), "Jwks doesn't have key to match kid or alg from Jwt"),
    "not signed": (lambda: token(None, "none"), "Jwt is not in the form of Header.Payload.Signature"),
    "signed with the public key": (forged_with_the_public_key, "Jwks doesn't have key to match kid or alg from Jwt"),
    "for another service": (lambda: token(aud="other"), "Audiences in Jwt are not allowed"),
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


@pytest.mark.parametrize("key", ["another-key-of-some-length", "", API_KEY[:-1], API_KEY.upper()])
async def test_a_wrong_key_is_refused(edge: Edge, key: str) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    for call in (edge.http, edge.grpc):
        assert (await call(x_api_key=key)).status == 401


async def test_a_caller_has_limits(edge: Edge) -> None:
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


async def test_a_gate_believes_only_who_knows_the_key(edge: Edge) -> None:
    await edge.rules(public=False, owner={"uid": 42})
    key = (edge.mesh.directory / "envoy" / envoy.KEY_FILE).read_text().strip()
    assert await edge.gate(x_serving_uid="42", x_serving_edge=key) == Answer(200)
    for wrong in ("", key[:-1], key + "x", "none"):
        assert (await edge.gate(x_serving_uid="42", x_serving_edge=wrong)).status == 401


async def test_no_secret_is_shown(edge: Edge) -> None:
    await edge.http(authorization=f"Bearer {token()}", x_api_key=API_KEY)
    key = (edge.mesh.directory / "envoy" / envoy.KEY_FILE).read_text().strip()
    admin = str(edge.mesh.directory / envoy.ADMIN_SOCKET)
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(admin)) as session,
        session.get("http://localhost/config_dump?include_eds") as response,
    ):
        shown = await response.text()
    assert "x-serving-uid" in shown
    shown += "".join(path.read_text(errors="replace") for path in edge.mesh.directory.glob("*.log"))
    for secret in (key, API_KEY):
        assert secret not in shown
