"""Tokens of issuers: which ones a registry takes, and how it follows the issuers' keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from jwt.algorithms import get_default_algorithms
from structlog.testing import capture_logs

from atserving import lifecycle, rpc
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.errors import PermissionDenied, ServingError, StartError, Unauthenticated, Unavailable
from atserving.http2_stream import Headers
from atserving.local.examples import ROOT
from registry.operators import Operators
from tests.processes import running_registry
from tests.waiting import until, until_async

URL = "https://login.example"
AUDIENCE = "atserving"
TOKEN_SHA256 = hashlib.sha256(b"static").hexdigest()
FILE: dict[str, Any] = {
    "issuers": [{"name": "company", "issuer": URL, "audience": AUDIENCE, "jwks": "jwks.json"}],
    "operators": [
        {"name": "root", "role": "admin", "token_sha256": TOKEN_SHA256},
        {"name": "ada", "role": "admin", "issuer": "company", "subject": "ada@example.com"},
        {"name": "vision", "role": "publisher", "apps": ["eyes-*"], "issuer": "company", "group": "vision"},
        {"name": "sound", "role": "publisher", "apps": ["ears"], "issuer": "company", "group": "sound"},
        {"name": "all", "issuer": "company", "group": "staff"},
        {"name": "robot", "role": "publisher", "apps": ["digits"], "certificate": "spiffe://atserving/operator/robot"},
    ],
}

Key = Any


def rsa_key(bits: int = 2048) -> Key:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


RSA = rsa_key()
OTHER = rsa_key()
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Key, kid: str, algorithm: str, **fields: str) -> dict[str, Any]:
    """Return the public half of a key, as a JSON Web Key Set has it."""
    found = get_default_algorithms()[algorithm].to_jwk(key.public_key(), as_dict=True)
    return {**{name: value for name, value in found.items() if name != "key_ops"}, "kid": kid, **fields}


KEYS = [
    jwk(RSA, "rsa", "RS256"),
    jwk(RSA, "pinned", "RS256", alg="RS256"),
    jwk(EC, "ec", "ES256"),
    jwk(ED, "ed", "EdDSA"),
]


FAR_S = 43_200


def token(key: Key = RSA, algorithm: str = "RS256", kid: str = "rsa", headers: Any = None, **claims: Any) -> str:
    """Return a token of Ada, unless the claims say otherwise; a claim that is None is left out."""
    now_s = int(time.time())
    # Tests may run long after the tokens of this module were made.
    usual = {"iss": URL, "aud": AUDIENCE, "sub": "ada@example.com", "iat": now_s, "exp": now_s + 2 * FAR_S}
    payload = {name: value for name, value in {**usual, **claims}.items() if value is not None}
    return jwt.encode(payload, key, algorithm, headers={"kid": kid, **(headers or {})})


def part(value: Any) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=")


def forged(header: Any, payload: Any, sign: Callable[[bytes], bytes] = lambda _: b"x") -> str:
    """Return a token that no library makes."""
    signed = part(header) + b"." + part(payload)
    return (signed + b"." + part(sign(signed))).decode()


def claims(text: str) -> dict[str, Any]:
    found: dict[str, Any] = jwt.decode(text, options={"verify_signature": False})
    return found


def context(shown: str = "", *peer_names: str) -> rpc.Context:
    headers = [("authorization", f"Bearer {shown}")] if shown else []
    return rpc.Context(Headers(headers), peer_names=peer_names)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, FILE)


def write(folder: Path, content: dict[str, Any], keys: list[dict[str, Any]] = KEYS) -> Path:
    (folder / "jwks.json").write_text(json.dumps({"keys": keys}))
    path = folder / "operators.json"
    path.write_text(json.dumps(content))
    return path


def who(operators: Operators, shown: str, *peer_names: str) -> str:
    return operators.identify(context(shown, *peer_names)).name


GOOD = {
    "RS256": token(),
    "RS512": token(algorithm="RS512"),
    "PS256": token(algorithm="PS256"),
    "the algorithm of its key": token(kid="pinned"),
    "ES256": token(EC, "ES256", "ec"),
    "EdDSA": token(ED, "EdDSA", "ed"),
    "several audiences": token(aud=["others", AUDIENCE]),
    "a clock that is late": token(nbf=int(time.time()) + 20, iat=int(time.time()) + 20),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_token_of_an_issuer_tells_who_it_is(file: Path, kind: str) -> None:
    operators = Operators(file)
    assert who(operators, GOOD[kind]) == "ada"
    assert who(operators, "static") == "root"


def hmac_by_public_key(signed: bytes) -> bytes:
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hmac.digest(pem, signed, "sha256")


def altered(text: str, **changes: Any) -> str:
    header, _, signature = text.split(".")
    return f"{header}.{part({**claims(text), **changes}).decode()}.{signature}"


NOW_S = int(time.time())
NESTED = b'{"iss": "' + URL.encode() + b'", "sub": ' + b"[" * 4000 + b"]" * 4000 + b"}"
BAD = {
    "expired": (token(exp=NOW_S - 60), "has expired"),
    "not yet valid": (token(nbf=NOW_S + FAR_S), "not valid yet"),
    "from the future": (token(iat=NOW_S + FAR_S), "not valid yet"),
    "another issuer": (token(iss="https://evil.example"), "does not know this token"),
    "no issuer": (token(iss=None), "does not know this token"),
    "an issuer like ours": (token(iss=f"{URL}/"), "does not know this token"),
    "another audience": (token(aud="others"), "another audience"),
    "no audience": (token(aud=None), "lacks aud"),
    "no end": (token(exp=None), "lacks exp"),
    "no subject": (token(sub=None), "lacks sub"),
    "a subject that is no name": (token(sub="a\nb"), "is no name"),
    "another key": (token(OTHER), "wrong signature"),
    "an altered claim": (altered(token(sub="eve"), sub="ada@example.com"), "wrong signature"),
    "no signature": (forged({"alg": "none", "kid": "rsa"}, claims(token()), lambda _: b""), "an algorithm"),
    "an empty signature": (token().rpartition(".")[0] + ".", "wrong signature"),
    "a shared secret that is public": (
        forged({"alg": "HS256", "typ": "JWT", "kid": "rsa"}, claims(token()), hmac_by_public_key),
        "an algorithm",
    ),
    "another algorithm than its key's": (token(algorithm="RS512", kid="pinned"), "an algorithm"),
    "the kind of another key": (token(EC, "ES256", "rsa"), "an algorithm"),
    "an unknown key": (token(kid="other"), "no such key"),
    "a key without a name": (token(headers={"kid": ""}), "no such key"),
    "a key of its own": (token(OTHER, kid="own", headers={"jwk": jwk(OTHER, "own", "RS256")}), "no such key"),
    "a path as a key": (token(kid="../../../../dev/null"), "no such key"),
    "an unknown demand": (token(headers={"crit": ["exp"]}), "malformed"),
    "deep JSON": (forged({"alg": "RS256", "kid": "rsa"}, NESTED[:6000]), "malformed"),
    "very deep JSON": (forged({"alg": "RS256", "kid": "rsa"}, b"[" * 5500), "malformed"),
    "a list": (forged({"alg": "RS256", "kid": "rsa"}, ["iss"]), "malformed"),
    "an issuer that is a list": (forged({"alg": "RS256", "kid": "rsa"}, {"iss": [URL]}), "malformed"),
    "a number as a key": (forged({"alg": "RS256", "kid": 7}, claims(token())), "malformed"),
    "huge times": (token(exp=1e400), "malformed"),
    "text": ("a.b.c", "malformed"),
    "no text": ("..", "malformed"),
    "too much": (token(sub="x" * 9000), "longer than 8192"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_token_is_refused_for_its_reason(file: Path, kind: str) -> None:
    shown, reason = BAD[kind]
    operators = Operators(file)
    with pytest.raises(Unauthenticated, match=reason) as refused:
        who(operators, shown)
    # A right certificate does not help.
    with pytest.raises(Unauthenticated):
        who(operators, shown, "spiffe://atserving/operator/robot")
    assert shown[-20:] not in refused.value.message


def test_groups_add_up_and_a_member_has_a_name_of_its_own(file: Path) -> None:
    operators = Operators(file)
    both = operators.identify(context(token(sub="bob", groups=["sound", "vision", "unknown", 7])))
    assert (both.name, both.role, both.apps) == ("company/bob", "publisher", ("ears", "eyes-*"))
    assert [both.may_change(app) for app in ("eyes-1", "ears", "digits", "")] == [True, True, False, False]
    assert operators.identify(context(token(sub="bob", groups="staff"))).role == "viewer"
    # Who has the name of an operator with a token is not that operator.
    assert who(operators, token(sub="root", groups=["staff"])) == "company/root"
    ada = operators.identify(context(token(groups=["vision"])))
    assert (ada.name, ada.role, ada.known_by) == ("ada", "admin", "issuer company")
    for groups in ([], None, {"vision": True}, [["vision"]]):
        with pytest.raises(PermissionDenied, match="company/eve is no operator here"):
            who(operators, token(sub="eve", groups=groups))


def test_claims_have_the_names_that_the_file_says(tmp_path: Path) -> None:
    issuer = {**FILE["issuers"][0], "subject_claim": "email", "groups_claim": "https://example.com/roles"}
    operators = Operators(write(tmp_path, {**FILE, "issuers": [issuer]}))
    assert who(operators, token(sub="7", email="ada@example.com")) == "ada"
    roles: dict[str, Any] = {"https://example.com/roles": ["vision"]}
    assert who(operators, token(email="bob@example.com", groups=["sound"], **roles)) == "company/bob@example.com"
    with pytest.raises(Unauthenticated, match="lacks email"):
        who(operators, token())


def test_a_certificate_tells_who_it_is(file: Path) -> None:
    operators = Operators(file)
    assert who(operators, "", "spiffe://atserving/gate", "spiffe://atserving/operator/robot") == "robot"
    update = admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app="digits"))
    robot = context("", "spiffe://atserving/operator/robot")
    assert operators.authorize("UpdateAccess", update, robot) == "robot"
    assert robot.notes == {"operator": "robot", "role": "publisher", "known_by": "certificate"}
    with pytest.raises(PermissionDenied):
        operators.authorize("UpdateAccess", admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app="x")), robot)
    for names in (
        ["spiffe://atserving/envoy"],
        ["spiffe://atserving/operator/robot/x"],
        ["spiffe://other/operator/robot"],
    ):
        with pytest.raises(Unauthenticated, match=names[0]):
            who(operators, "", *names)
    with pytest.raises(Unauthenticated, match="wants to know who you are"):
        who(operators, "")


def test_a_mounted_secret_is_followed(tmp_path: Path) -> None:
    for version, name in (("v1", "root"), ("v2", "new")):
        (tmp_path / version).mkdir()
        write(tmp_path / version, {"operators": [{"name": name, "token_sha256": TOKEN_SHA256}]})
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "operators.json").symlink_to("data/operators.json")
    operators = Operators(tmp_path / "operators.json")
    assert who(operators, "static") == "root"
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "data")
    assert who(operators, "static") == "new"


def test_many_wrong_tokens_are_one_line(file: Path) -> None:
    operators = Operators(file)
    began_s = time.monotonic()
    with capture_logs() as lines:
        for number in range(200):
            with pytest.raises(Unauthenticated):
                who(operators, f"secret-{number}")
    assert 1 <= len(lines) <= 1 + (time.monotonic() - began_s) // 10
    assert (lines[0]["event"], "secret" in str(lines)) == ("operators refused", False)


def test_keys_in_a_file_are_followed(file: Path) -> None:
    operators = Operators(file)
    keys = file.parent / "jwks.json"
    keys.write_text(json.dumps({"keys": [jwk(OTHER, "new", "RS256")]}))
    assert who(operators, token(OTHER, kid="new")) == "ada"
    with pytest.raises(Unauthenticated, match="no such key"):
        who(operators, token())
    keys.write_text("{")
    assert who(operators, token(OTHER, kid="new")) == "ada"


def test_the_documented_file_is_right(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operators.md").read_text()
    block = page[page.index("    {\n") :].partition("\n\n")[0]
    path = write(tmp_path, json.loads(block.replace('"..."', json.dumps(TOKEN_SHA256))))
    operators = Operators(path)
    assert ([each.name for each in operators.of_file], operators.issuers) == (["ada", "bob", "vision"], ("company",))


def test_a_registry_without_issuers_loads_no_library_for_them() -> None:
    command = [sys.executable, "-c", "import sys, registry.__main__; print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "registry.operators.known" in loaded
    assert not {"jwt", "cryptography", "registry.operators.tokens"} & set(loaded)


WEAK, SECRET = jwk(rsa_key(1024), "weak", "RS256"), {"kty": "oct", "kid": "rsa", "k": "c2VjcmV0", "alg": "HS256"}


@pytest.mark.parametrize(
    ("change", "keys", "reason"),
    [
        ({}, [], "no key for signatures"),
        ({}, [WEAK, SECRET, {**KEYS[0], "use": "enc"}, {**KEYS[0], "alg": "HS256"}, 7], "no key for signatures"),
        ({}, [{**KEYS[0], "n": 7}, {**KEYS[0], "kid": 7}, {**KEYS[2], "x": "AA"}], "no key for signatures"),
        ({}, KEYS * 30, "limit of 100"),
        ({"jwks": "none.json"}, KEYS, "none.json: No such file"),
        ({"jwks": "http://login.example/keys"}, KEYS, "should be an https:// URL"),
        ({"jwks": "https://login.example:x/keys"}, KEYS, "jwks: Port could not"),
        ({"jwks": "https://login.example/keys", "ca": "none.pem"}, KEYS, "can't load its ca none.pem"),
        ({"audience": ""}, KEYS, "length >= 1"),
        ({"algorithms": ["none"]}, KEYS, "unknown field"),
        ({"name": "other"}, KEYS, "operator 'ada': there is no issuer 'company'"),
    ],
)
def test_wrong_issuers_stop_the_start(tmp_path: Path, change: dict[str, Any], keys: Any, reason: str) -> None:
    path = write(tmp_path, {**FILE, "issuers": [{**FILE["issuers"][0], **change}]}, keys)
    with pytest.raises(StartError, match=reason) as refused:
        Operators(path)
    assert str(refused.value).startswith(str(path))


@dataclass
class Issuer:
    """An issuer that serves its keys over HTTPS."""

    folder: Path
    keys: list[dict[str, Any]] = field(default_factory=lambda: KEYS)
    asked: int = 0
    is_silent: bool = False
    left: threading.Event = field(default_factory=threading.Event)
    body: bytes | None = None

    def __post_init__(self) -> None:
        self.ca, self._identity = self.folder / "ca.pem", self.folder / "identity.pem"
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.ca.write_bytes(pem)
        self._identity.write_bytes(private + pem)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.server_bind()
        self.url = f"https://127.0.0.1:{self._server.server_port}/keys?v=1"

    def start(self) -> None:
        """Answer from now on; until then, connections are refused."""
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trusted.load_cert_chain(self._identity)
        self._server.socket = trusted.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                if issuer.is_silent and not self.rfile.read(1):
                    issuer.left.set()
                    return
                body = json.dumps({"keys": issuer.keys}).encode() if issuer.body is None else issuer.body
                self.send_response(200 if self.path == "/keys?v=1" else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def file(self) -> Path:
        """Write a file of operators that names it."""
        issuer = {**FILE["issuers"][0], "jwks": self.url, "ca": "ca.pem"}
        return write(self.folder, {**FILE, "issuers": [issuer]})


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[Issuer]:
    issuer = Issuer(tmp_path)
    yield issuer
    if issuer.asked:
        issuer.stop()


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Operators]:
    operators = Operators(path)
    task = asyncio.create_task(operators.run())
    try:
        yield operators
        assert not task.done()
    finally:
        await lifecycle.end([task])


def is_known(operators: Operators, shown: str) -> bool:
    try:
        return who(operators, shown) == "ada"
    except ServingError:
        return False


async def test_keys_of_a_url_are_fetched_and_rotate(issuer: Issuer) -> None:
    issuer.start()
    async with running(issuer.file()) as operators:
        await until(lambda: is_known(operators, token()))
        issuer.keys = [jwk(OTHER, "new", "RS256")]
        await until(lambda: is_known(operators, token(OTHER, kid="new")))
        with pytest.raises(Unauthenticated, match="no such key"):
            who(operators, token())


async def test_unknown_keys_make_a_registry_ask_now_and_then_only(issuer: Issuer) -> None:
    issuer.start()
    async with running(issuer.file()) as operators:
        await until(lambda: is_known(operators, token()))
        asked = issuer.asked
        for number in range(300):
            assert not is_known(operators, token(kid=str(number)))
        await until(lambda: issuer.asked > asked)
        assert issuer.asked <= asked + 2
        assert is_known(operators, token())


@pytest.mark.parametrize("body", [b'{"keys": [7]}', b"x" * (300 << 10)])
async def test_an_issuer_that_answers_nonsense_takes_no_key_away(issuer: Issuer, body: bytes) -> None:
    issuer.start()
    async with running(issuer.file()) as operators:
        await until(lambda: is_known(operators, token()))
        asked, issuer.body = issuer.asked, body
        assert not is_known(operators, token(kid="other"))
        await until(lambda: issuer.asked > asked)
        assert is_known(operators, token())


async def test_a_silent_issuer_holds_up_nobody(issuer: Issuer) -> None:
    issuer.is_silent = True
    issuer.start()
    async with running(issuer.file()) as operators:
        await until(lambda: issuer.asked)
        with pytest.raises(Unavailable):
            who(operators, token())
        assert who(operators, "static") == "root"
    # Nor the end of the process.
    await until(issuer.left.is_set)


async def test_an_issuer_whose_certificate_is_not_trusted_has_no_keys(issuer: Issuer) -> None:
    path = issuer.file()
    issuer.start()
    content = json.loads(path.read_text())
    del content["issuers"][0]["ca"]
    path.write_text(json.dumps(content))
    async with running(path) as operators:
        with pytest.raises(Unavailable, match="keys of the issuer company are not here yet"):
            who(operators, token())
        assert who(operators, "static") == "root"
    assert not issuer.asked


async def test_a_registry_starts_without_its_issuer(issuer: Issuer, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry", "--operators", str(issuer.file())) as registry:
        registry.logged(event="issuer lost")

        def status(shown: str) -> grpc.StatusCode:
            with grpc.insecure_channel(registry.address) as channel:
                stub = admin_pb2_grpc.AdminServiceStub(channel)
                try:
                    stub.GetSelf(
                        admin_pb2.GetSelfRequest(), metadata=(("authorization", f"Bearer {shown}"),), timeout=20
                    )
                except grpc.RpcError as error:
                    assert isinstance(error, grpc.Call)
                    return error.code()
            return grpc.StatusCode.OK

        assert status("static") is grpc.StatusCode.OK
        assert status(token()) is grpc.StatusCode.UNAVAILABLE
        issuer.start()

        async def known() -> bool:
            return await asyncio.to_thread(status, token()) is grpc.StatusCode.OK

        await until_async(known)
        shown, _ = BAD["expired"]
        assert status(shown) is grpc.StatusCode.UNAUTHENTICATED
        registry.logged(event="operators refused", reason="the token has expired: get a new one")
        log = registry.log_text()
        assert not [each for each in (shown, token()) if each in log or each.split(".")[2] in log]
