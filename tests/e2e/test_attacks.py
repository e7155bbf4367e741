"""An outsider, callers, and processes that were taken over attack a mesh with all its protection; each is refused.

An attack has to fail for its own reason: a refusal for another one would hide a hole.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa
from google.protobuf.message import Message
from jwt.algorithms import RSAAlgorithm

from atserving import link, transport
from atserving.admin.v1 import admin_pb2
from atserving.local import commands, examples
from atserving.local.authority import Authority
from atserving.local.mesh import Mesh
from atserving.local.publishing import file_uri
from atserving.tls import ENVOY, EVALUATOR, GATE, OPERATOR, REGISTRY, Tls, TlsFiles
from atserving.v1 import edge_pb2, evaluator_pb2, registry_pb2, serving_pb2
from tests.e2e.callers import API_KEY, OWN, SEVEN, documented, forged_with_the_public_key, token
from tests.evaluator.digits import digits_tar
from tests.evaluator.sandbox.attacks import SCRIPT, require_sandbox
from tests.processes import Evaluator
from tests.registry.test_operators import add
from tests.signing import Signer, trusted
from tests.waiting import PATIENCE_S, until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
DIGITS, FACES, LOCAL = f"{EVALUATOR}/digits", f"{EVALUATOR}/faces", f"{OPERATOR}/local"
REGISTERING, OPERATING = "/atserving.v1.RegistryService/", "/atserving.admin.v1.AdminService/"
INFERRING, SERVING, EDGE = (f"/atserving.v1.{each}/" for each in ("EvaluatorService", "ServingService", "EdgeService"))
INSTANCE = registry_pb2.Instance(app="digits", version="v1", id="evil", address="127.0.0.1:1", capacity=1000)
EVAL = serving_pb2.EvalRequest(app="digits", data=[serving_pb2.Resource(body=SEVEN)])


@dataclass
class Target:
    """The mesh, and what an attacker may have."""

    mesh: Mesh
    pat: str
    """The token of a publisher of `faces`."""
    signer: Signer
    """May sign releases of `faces`."""
    folder: Path

    @property
    def authority(self) -> Authority:
        assert self.mesh.authority
        return self.mesh.authority

    @property
    def gate(self) -> str:
        return f"127.0.0.1:{self.mesh.ports.gates[0]}"

    @property
    def instance(self) -> str:
        lines = self.mesh.log("evaluator-digits-v1").splitlines()
        return str(next(json.loads(line)["address"] for line in lines if "instance registered" in line))

    async def rest(self, body: bytes | dict[str, object] = SEVEN, **headers: str) -> str:
        """Call the edge over HTTP; return the status and the reason."""
        sent = {"content-type": "application/octet-stream"} | {k.replace("_", "-"): v for k, v in headers.items()}
        if isinstance(body, dict):
            body, sent["content-type"] = json.dumps(body).encode(), "application/json"
        url = f"{self.mesh.url}/v1/eval/digits"
        async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=sent) as got:
            return f"{got.status} {(await got.json(content_type=None)).get('message', '')}"

    async def script(self, code: str) -> str:
        """Let the script of `faces` run code, by a request to the edge; return the status and what came of it."""
        body = {"data": {"uri": f"data:;base64,{base64.b64encode(SEVEN).decode()}"}, "params": {"code": code}}
        url = f"{self.mesh.url}/v1/eval/faces/v1"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as got:
            return f"{got.status} {(await got.json()).get('result')}"

    async def call(self, path: str, request: Message, role: str = "", at: str = "", **headers: str) -> str:
        """Call a method with the certificate of a role, or in plain text; return the status and the reason."""
        service = path.rpartition("/")[0].rpartition(".")[2]
        address, to = {
            "RegistryService": (self.mesh.registry, REGISTRY),
            "AdminService": (self.mesh.registry, REGISTRY),
            "EvaluatorService": (self.instance, EVALUATOR),
        }.get(service, (self.gate, GATE))
        tls = Tls(self.authority.files(role)) if role else None
        metadata = [(name.replace("_", "-"), value) for name, value in headers.items()]
        async with transport.channel(at or address, tls=tls, role=to) as channel:
            method = channel.unary_stream(path, type(request).SerializeToString, None)
            try:
                async for _ in method(request, metadata=metadata, timeout=PATIENCE_S):
                    break
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name} {error.details()}"
        return "OK"

    async def connect(self, process: str, address: str, files: TlsFiles | None, sent: bytes = b"") -> str:
        """Connect to a process by TLS until it logs why it refuses that; return the reason."""
        context = ssl.create_default_context(cafile=self.authority.folder / "ca.crt")
        context.check_hostname = False
        if files:
            context.load_cert_chain(files.cert, files.key)
        host, _, port = address.rpartition(":")
        before = len(self.mesh.log(process))
        reasons: list[str] = []
        # Lines of handshakes have the peer. A line of an earlier connection may come late.
        own: set[str | None] = {None}

        async def refused() -> bool:
            with suppress(OSError):
                connection = socket.socket()
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
                own.add("{}:{}".format(*connection.getsockname()))
                reader, writer = await asyncio.open_connection(sock=connection, ssl=context, server_hostname="")
                writer.write(sent)
                await reader.read()
                writer.close()
            lines = [json.loads(line) for line in self.mesh.log(process)[before:].splitlines() if line.startswith("{")]
            refusals = [each for each in lines if each["event"] == "connection refused"]
            reasons[:] = [each["reason"] for each in refusals if each.get("peer") in own]
            return bool(reasons)

        await until_async(refused, what=f"{process} refuses a connection")
        return reasons[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    folder = tmp_path_factory.mktemp("attacks")
    callers = folder / "callers"
    callers.mkdir()
    public = {**json.loads(RSAAlgorithm.to_jwk(OWN.public_key())), "kid": "own", "alg": "RS256", "use": "sig"}
    (callers / "jwks.json").write_text(json.dumps({"keys": [public]}))
    (callers / "callers-jwt.yaml").write_text(documented("callers-jwt"))
    (callers / "callers-keys.yaml").write_text(documented("callers-keys").replace("a long random text", API_KEY))
    operators = folder / "operators.json"
    pat = add(operators, "pat", "--role", "publisher", "--app", "faces")
    known = json.loads(operators.read_text())
    known["operators"].append({"name": "local", "role": "admin", "certificate": f"spiffe://atserving/{LOCAL}"})
    operators.write_text(json.dumps(known))
    signer = Signer(folder, "signer")
    keys = trusted(folder / "keys.json", signer.entry("faces"), required=["faces"])
    extra = {"registry": ["--operators", str(operators), "--trusted-keys", str(keys)]}
    async with Mesh(serves=examples.DIGITS[:1], callers=callers, tls=True, extra=extra) as mesh:
        target = Target(mesh, pat, signer, folder)
        target.authority.issue(FACES)
        access = admin_pb2.Access(app="digits", public=False, owner=admin_pb2.Access.Owner(uid=42))
        request = admin_pb2.UpdateAccessRequest(access=access)
        assert await target.call(f"{OPERATING}UpdateAccess", request, LOCAL) == "OK"

        async def closed() -> bool:
            return (await target.rest()).startswith("401")

        await until_async(closed)
        yield target


async def test_those_with_the_right_credentials_get_in(target: Target) -> None:
    """Otherwise the attacks below would fail for no reason of theirs."""
    assert await target.rest(authorization=f"Bearer {token()}") == "200 "
    assert await target.rest(x_api_key=API_KEY) == "200 "
    assert await target.call(f"{SERVING}Eval", EVAL, ENVOY, x_serving_uid="42") == "OK"
    assert await target.call(f"{REGISTERING}Watch", registry_pb2.WatchRequest(app="digits"), DIGITS) == "OK"
    assert await target.call(f"{INFERRING}GetLoad", evaluator_pb2.GetLoadRequest(), GATE) == "OK"


NOBODY = "401 app 'digits' is not public, and the request carries no credentials"
NOBODY_GRPC = NOBODY.replace("401", "UNAUTHENTICATED")
Attack = Callable[[Target], Awaitable[str]]


def expired(target: Target) -> TlsFiles:
    return Authority(target.authority.folder).issue("gate/expired", valid=-timedelta(minutes=1))


def elsewhere(target: Target) -> TlsFiles:
    return Authority(target.folder / "elsewhere").issue(GATE)


def registering(role: str) -> Attack:
    request = registry_pb2.RegisterInstanceRequest(instance=INSTANCE)
    return lambda it: it.call(f"{REGISTERING}RegisterInstance", request, role)


def following(role: str, app: str = "") -> Attack:
    return lambda it: it.call(f"{REGISTERING}Watch", registry_pb2.WatchRequest(app=app), role)


def publishing(app: str, role: str, token: str | None = None) -> Attack:
    release = admin_pb2.Release(app=app, version="v9", file=f"file:///evil.tar#sha256={'0' * 64}")
    request = admin_pb2.CreateReleaseRequest(release=release, force=True)

    async def attack(it: Target) -> str:
        shown = it.pat if token is None else token
        headers = {"authorization": f"Bearer {shown}"} if shown else {}
        return await it.call(f"{OPERATING}CreateRelease", request, role, **headers)

    return attack


def fetching(uri: str) -> Attack:
    return lambda it: it.rest({"data": {"uri": uri}}, authorization=f"Bearer {token()}")


async def reading_etcd(it: Target) -> str:
    files = it.authority.files(DIGITS)
    tls = ["--cacert", str(files.ca), "--cert", str(files.cert), "--key", str(files.key)]
    command = [str(commands.BIN / "etcdctl"), "--endpoints", f"https://{it.mesh.etcd}", "--command-timeout", "2s"]
    done = await asyncio.to_thread(
        subprocess.run, [*command, *tls, "get", "--prefix", ""], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    return done.stderr


ATTACKS: dict[str, tuple[Attack, str]] = {
    # Callers at the edge.
    "a caller names itself": (lambda it: it.rest(x_serving_uid="42"), NOBODY),
    "a caller shows the key of the edge": (lambda it: it.rest(x_serving_uid="42", x_serving_edge="x" * 32), NOBODY),
    "a caller names its certificate": (
        lambda it: it.rest(x_forwarded_client_cert="URI=spiffe://company.example/caller/42"),
        NOBODY,
    ),
    "a caller names itself by gRPC": (
        lambda it: it.call(f"{SERVING}Eval", EVAL, at=it.mesh.url.removeprefix("http://"), x_serving_uid="42"),
        NOBODY_GRPC,
    ),
    "another caller's token": (
        lambda it: it.rest(authorization=f"Bearer {token(uid=7)}", x_serving_uid="42"),
        "403 this caller may not use app 'digits'",
    ),
    "an expired token": (lambda it: it.rest(authorization=f"Bearer {token(exp=1)}"), "401 Jwt is expired"),
    "a token signed by another": (
        lambda it: it.rest(authorization=f"Bearer {token(OTHER_KEY)}"),
        "401 Jwt verification fails",
    ),
    "a token without a signature": (
        lambda it: it.rest(authorization=f"Bearer {token(None, 'none')}"),
        r"401 Jwt is not in the form of Header\.Payload\.Signature",
    ),
    "a token signed with the public key": (
        lambda it: it.rest(authorization=f"Bearer {forged_with_the_public_key()}"),
        "401 Jwks doesn't have key to match kid or alg from Jwt",
    ),
    "a token for another service": (
        lambda it: it.rest(authorization=f"Bearer {token(aud='other')}"),
        "401 Audiences in Jwt are not allowed",
    ),
    "a wrong API key": (lambda it: it.rest(x_api_key="x" * 20), "401 Client authentication failed"),
    "a method of the inside": (
        lambda it: it.call(f"{EDGE}Eval", edge_pb2.EdgeEvalRequest(), at=it.mesh.url.removeprefix("http://")),
        "UNIMPLEMENTED",
    ),
    # Private addresses through an evaluator.
    "a private address": (fetching("http://169.254.169.254/latest"), "400 .*'169.254.169.254' is not a public address"),
    "a port of this machine": (fetching("http://127.0.0.1:1/"), "400 .*'127.0.0.1' is not a public address"),
    "a file of the evaluator": (fetching("file:///etc/passwd"), "400 .*unsupported uri"),
    # Whoever reaches the ports between the processes.
    "plain text at the registry": (
        lambda it: it.call(f"{REGISTERING}Watch", registry_pb2.WatchRequest()),
        "UNAVAILABLE",
    ),
    "no certificate": (
        lambda it: it.connect("registry", it.mesh.registry, None),
        "it shows no certificate",
    ),
    "a certificate of another authority": (
        lambda it: it.connect("gate", it.gate, elsewhere(it)),
        "unable to get local issuer certificate",
    ),
    "an expired certificate": (
        lambda it: it.connect("registry", it.mesh.registry, expired(it)),
        "certificate has expired",
    ),
    "a link from no gate": (
        lambda it: it.connect("evaluator-digits-v1", it.instance, it.authority.files(FACES), link.PREFACE),
        "spiffe://atserving/evaluator/faces is no gate",
    ),
    # Processes that were taken over.
    "an evaluator registers for another app": (
        registering(FACES),
        "PERMISSION_DENIED spiffe://atserving/evaluator/faces may not call RegisterInstance here, only evaluator/",
    ),
    "a gate registers an instance": (
        registering(GATE),
        "PERMISSION_DENIED spiffe://atserving/gate may not call RegisterInstance here, only evaluator/digits may",
    ),
    "an evaluator follows all apps": (
        following(FACES),
        "PERMISSION_DENIED spiffe://atserving/evaluator/faces may not call Watch here, only gate may",
    ),
    "an evaluator follows another app": (
        following(FACES, "digits"),
        "PERMISSION_DENIED spiffe://atserving/evaluator/faces may not call Watch here, only gate or evaluator/digits",
    ),
    "an evaluator calls a gate as Envoy": (
        lambda it: it.call(f"{SERVING}Eval", EVAL, FACES, x_serving_uid="42"),
        "PERMISSION_DENIED spiffe://atserving/evaluator/faces may only ask for the health here",
    ),
    "an evaluator calls another one": (
        lambda it: it.call(f"{INFERRING}Infer", evaluator_pb2.InferRequest(), FACES),
        "PERMISSION_DENIED spiffe://atserving/evaluator/faces may only ask for the health here",
    ),
    "an evaluator reads etcd": (reading_etcd, ".*(certificate|authentication|connection|deadline)"),
    # Operators.
    "a gate publishes": (publishing("faces", GATE, ""), "UNAUTHENTICATED the registry wants to know who you are"),
    "a stolen certificate of Envoy publishes": (
        publishing("faces", ENVOY, ""),
        "UNAUTHENTICATED the registry wants to know who you are",
    ),
    "a wrong token publishes": (
        publishing("faces", ENVOY, "x"),
        "UNAUTHENTICATED the registry does not know this token",
    ),
    "a publisher publishes another app": (
        publishing("digits", ENVOY),
        "PERMISSION_DENIED pat is publisher, and may not change app 'digits'",
    ),
    "a publisher publishes an unsigned release": (
        publishing("faces", ENVOY),
        "(FAILED_PRECONDITION|INVALID_ARGUMENT|PERMISSION_DENIED) .*it has no signature",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_is_refused_for_its_own_reason(target: Target, name: str) -> None:
    attack, reason = ATTACKS[name]
    assert re.match(reason, await attack(target), re.DOTALL)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted(target: Target) -> AsyncIterator[Target]:
    """Publish a hostile script for `faces`, signed by somebody who may, and serve it."""
    require_sandbox()
    tar = Path(digits_tar(target.folder / "faces.tar", **{"net.py": SCRIPT}).removeprefix("file://"))
    fields = {"name": "faces", "version": "v1", "file": file_uri(tar)}
    signature = target.signer.signed(**fields)["signature"]
    release = admin_pb2.Release(
        app="faces", version="v1", file=fields["file"], signature=signature, phase=admin_pb2.PHASE_PRODUCTION
    )
    token = {"authorization": f"Bearer {target.pat}"}
    request = admin_pb2.CreateReleaseRequest(release=release, force=True)
    assert await target.call(f"{OPERATING}CreateRelease", request, ENVOY, **token) == "OK"
    flags = [*commands.tls(target.authority.files(FACES)), "--trusted-keys", str(target.folder / "keys.json")]
    process = Evaluator(target.mesh.registry, "faces", "v1", "--sandbox=require", *flags)
    process.start()
    try:
        await asyncio.to_thread(process.wait_serving)
        await until_async(lambda: answers(target))
        yield target
    finally:
        process.kill()


async def answers(target: Target) -> bool:
    return await target.script("found = 1") == "200 {'found': 1}"


SCRIPTED = {
    "the environment of its evaluator": ("os.open(f'/proc/{FRONT}/environ', os.O_RDONLY)", errno.EACCES),
    "the memory of its evaluator": ("os.open(f'/proc/{FRONT}/mem', os.O_RDONLY)", errno.EACCES),
    "the key of its evaluator": ("os.open(KEY, os.O_RDONLY)", errno.EACCES),
    "the registry": ("socket.create_connection(('127.0.0.1', REGISTRY))", errno.EACCES),
    "the users of the machine": ("os.open('/etc/shadow', os.O_RDONLY)", errno.EACCES),
    "a file of the machine": ("open('/tmp/planted', 'w')", errno.EACCES),
    "the life of its evaluator": ("os.kill(FRONT, signal.SIGKILL)", errno.EPERM),
}


@pytest.mark.parametrize("wanted", SCRIPTED)
async def test_a_script_does_not_get(scripted: Target, wanted: str) -> None:
    code, reason = SCRIPTED[wanted]
    code = code.replace("REGISTRY", str(scripted.mesh.ports.registry))
    code = code.replace("KEY", repr(str(scripted.authority.files(FACES).key)))
    assert await scripted.script(code) == f"200 {{'refused': {reason}}}"


async def test_the_mesh_has_served_on_and_let_nothing_in(target: Target) -> None:
    assert await target.rest(authorization=f"Bearer {token()}") == "200 "
    found = admin_pb2.ListInstancesRequest(app="digits")
    assert await target.call(f"{OPERATING}ListInstances", found, LOCAL) == "OK"
    for name in ("registry", "gate", "evaluator-digits-v1"):
        assert '"id":"evil"' not in target.mesh.log(name)
        assert "Traceback" not in target.mesh.log(name)
