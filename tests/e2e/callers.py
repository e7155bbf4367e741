"""A mesh whose edge knows callers by all schemes, with Envoy's files as docs/callers.md shows them, and its callers."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import ssl
import struct
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from jwt.algorithms import RSAAlgorithm

from atserving import transport
from atserving.local import envoy, examples
from atserving.local.examples import FOLDER, ROOT
from atserving.local.mesh import Mesh
from atserving.v1 import serving_pb2, serving_pb2_grpc
from tests.processes import etcdctl
from tests.waiting import until_async

SEVEN = (FOLDER / "digits" / "images" / "7.png").read_bytes()
OWN = rsa.generate_private_key(public_exponent=65537, key_size=2048)
API_KEY = "an-api-key-of-some-length"
ACCESS_KEY, SECRET_KEY = "the-access-key", "the-secret-key-of-some-length"
CALLER_KEYS = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "uid": 42, "groups": ["vision"]}
OTHERS_API_KEY, OTHERS_ACCESS_KEY = "an-api-key-of-another", "the-access-key-of-another"
"""Those of the caller 7; both callers have the same secret key."""
BYTES, JSON = "application/octet-stream", "application/json"


def documented(name: str) -> str:
    """Return the file of Envoy with this name, as docs/callers.md shows it."""
    for block in (ROOT / "docs" / "callers.md").read_text().split("\n    resources:\n")[1:]:
        lines = ["    resources:"]
        for line in block.split("\n"):
            if line and not line.startswith("    "):
                break
            lines.append(line)
        text = textwrap.dedent("\n".join(lines)).rstrip() + "\n"
        if f"    name: {name}\n" in text:
            return text
    raise AssertionError(f"docs/callers.md has no {name}")


REMOTE = (ROOT / "docs" / "callers.md").read_text().partition("in place of `local_jwks`:\n\n")[2].partition("\n\n")[0]
"""Where the filter of tokens gets keys from a URL, as docs/callers.md shows it."""


def public_key(key: rsa.RSAPrivateKey, kid: str) -> dict[str, Any]:
    """Return a public key as an issuer shows it."""
    return {**json.loads(RSAAlgorithm.to_jwk(key.public_key())), "kid": kid, "alg": "RS256", "use": "sig"}


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


def qiniu(
    path: str,
    host: str,
    content_type: str,
    body: bytes,
    secret_key: str = SECRET_KEY,
    access_key: str = ACCESS_KEY,
    **own: str,
) -> str:
    """Return the authorization of a POST, by Qiniu's scheme; ``own`` are headers of Qiniu."""
    lines = [f"POST {path}", f"Host: {host}", f"Content-Type: {content_type}"]
    lines += [f"X-Qiniu-{name.capitalize()}: {value}" for name, value in sorted(own.items())]
    signed = "\n".join([*lines, "", ""]).encode() + (b"" if content_type == BYTES else body)
    digest = hmac.new(secret_key.encode(), signed, hashlib.sha1).digest()
    return f"Qiniu {access_key}:{base64.urlsafe_b64encode(digest).decode()}"


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, in PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        own = self._builder(self._name, self._key, 10).add_extension(x509.BasicConstraints(True, None), critical=True)
        self.certificate = own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def certified(
        self, *names: x509.GeneralName, organizations: tuple[str, ...] = (), days: int = 10, usage: Any = None
    ) -> Certificate:
        """Return a certificate with these alternative names; one of ``days`` below zero has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, each) for each in organizations])
        builder = self._builder(subject, key, days)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not organizations)
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return Certificate(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def caller(self, uid: str, *organizations: str, days: int = 10, usage: Any = None) -> Certificate:
        """Return the certificate of a caller."""
        name = x509.UniformResourceIdentifier(f"spiffe://company.example/caller/{uid}")
        return self.certified(name, organizations=organizations, days=days, usage=usage)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=20))
            .not_valid_after(now + datetime.timedelta(days=days))
        )


AUTHORITY = Authority()


@dataclass
class Answer:
    """The answer to a caller, over HTTP or gRPC."""

    status: int
    message: str = ""
    challenge: str = ""


class Edge:
    """Calls the app `digits` at Envoy, or at a gate directly. A call with a certificate is one over TLS."""

    def __init__(self, mesh: Mesh, folder: Path) -> None:
        self.mesh = mesh
        self.takes_tokens = True
        self._folder = folder
        self._rules = 0

    @property
    def host(self) -> str:
        return self.mesh.url.removeprefix("http://")

    @property
    def edge_key(self) -> str:
        return (self.mesh.directory / "envoy" / envoy.KEY_FILE).read_text().strip()

    def url(self, certificate: Certificate | None) -> str:
        return self.mesh.tls_url if certificate else self.mesh.url

    def tls(self, certificate: Certificate | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=AUTHORITY.certificate.decode())
        if certificate and certificate.certificate:
            path = self._folder / f"{hashlib.sha256(certificate.certificate).hexdigest()}.pem"
            path.write_bytes(certificate.certificate + certificate.key)
            context.load_cert_chain(path)
        return context

    async def http(
        self,
        path: str = "/v1/eval/digits",
        body: bytes = SEVEN,
        certificate: Certificate | None = None,
        /,
        **headers: str,
    ) -> Answer:
        sent = {"content-type": BYTES, **{name.replace("_", "-"): each for name, each in headers.items()}}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url(certificate) + path, data=body, headers=sent, ssl=self.tls(certificate)) as response,
        ):
            document = await response.json(content_type=None)
            message = document["message"] if isinstance(document, dict) else json.dumps(document)
            return Answer(response.status, message, response.headers.get("www-authenticate", ""))

    async def grpc(self, address: str = "", certificate: Certificate | None = None, /, **headers: str) -> Answer:
        return await self.grpc_with(
            [(name.replace("_", "-"), value) for name, value in headers.items()], address, certificate
        )

    async def grpc_with(
        self, metadata: list[tuple[str, str | bytes]], address: str = "", certificate: Certificate | None = None
    ) -> Answer:
        address = address or self.url(certificate).partition("//")[2]
        if certificate:
            shown = (certificate.key, certificate.certificate) if certificate.certificate else (None, None)
            credentials = grpc.ssl_channel_credentials(AUTHORITY.certificate, *shown)
            opened = grpc.aio.secure_channel(address, credentials)
        else:
            opened = transport.channel(address)
        async with opened as channel:
            try:
                await serving_pb2_grpc.ServingServiceStub(channel).Eval(REQUEST, metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                statuses = {grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403}
                said = [*(error.trailing_metadata() or ()), *(error.initial_metadata() or ())]
                challenge = next((str(value) for name, value in said if name == "www-authenticate"), "")
                return Answer(statuses.get(error.code(), 500), error.details() or "", challenge)
            return Answer(200)

    async def gate(self, **headers: str) -> Answer:
        return await self.grpc(f"127.0.0.1:{self.mesh.ports.gates[0]}", **headers)

    async def rules(self, **rules: Any) -> None:
        """Set who may call; wait until the gate follows."""
        self._rules += 1
        group = f"rules-{self._rules}"
        if not rules.get("public"):
            rules["group_whitelist"] = [*rules.get("group_whitelist", []), group]
        etcdctl(self.mesh.etcd, "put", "/ava/serving/app/metadata/digits", json.dumps(rules))

        async def follows() -> bool:
            return (await self.gate(x_serving_groups=group, x_serving_edge=self.edge_key)).status == 200

        await until_async(follows)


REQUEST = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=SEVEN)])
TYPED_PATH = "/atserving.v1.ServingService/Eval"
TYPED_BODY = struct.pack(">BI", 0, REQUEST.ByteSize()) + REQUEST.SerializeToString()
TLS_ALONE = Certificate(b"", b"")
"""Stands for TLS without a certificate of the caller's."""


@asynccontextmanager
async def edge_for_all(folder: Path, *, tokens: bool = True) -> AsyncIterator[Edge]:
    """Run a mesh whose edge knows callers by all schemes, or all but tokens. Its files of callers are in ``folder``."""
    (folder / "jwks.json").write_text(json.dumps({"keys": [public_key(OWN, "own")]}))
    for name in ("callers-jwt", "callers-keys", "callers-qiniu", "callers-certs", "edge-tls", "edge-clients"):
        (folder / f"{name}.yaml").write_text(documented(name))
    if not tokens:
        (folder / "callers-jwt.yaml").unlink()
    shown = '- {key: "a long random text", client: "42"}'
    keys = documented("callers-keys")
    assert shown in keys
    both = [{"key": API_KEY, "client": "42"}, {"key": OTHERS_API_KEY, "client": "7"}]
    (folder / "callers-keys.yaml").write_text(
        keys.replace(shown, f"- {json.dumps(both[0])}\n{' ' * 12}- {json.dumps(both[1])}")
    )
    others = {"access_key": OTHERS_ACCESS_KEY, "secret_key": SECRET_KEY, "uid": 7}
    (folder / envoy.CALLER_KEYS_FILE).write_text(json.dumps({"keys": [CALLER_KEYS, others]}))
    own = AUTHORITY.certified(x509.DNSName("localhost"))
    for file, content in {
        "tls.crt": own.certificate,
        "tls.key": own.key,
        "callers.crt": AUTHORITY.certificate,
    }.items():
        (folder / file).write_bytes(content)
    at_once = {"envoy": ["--file-flush-interval-msec", "50"]}
    async with Mesh(serves=examples.DIGITS, callers=folder, extra=at_once) as mesh:
        edge = Edge(mesh, folder)
        edge.takes_tokens = tokens
        yield edge
