"""A registry with TLS: which certificate may follow, register, report and operate, and that commands have one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.cli.ops.client import FORBIDDEN, UNAVAILABLE
from atserving.local import commands
from atserving.local.authority import Authority
from atserving.tls import ENVOY, EVALUATOR, GATE, OPERATOR, REGISTRY, Tls
from atserving.v1 import registry_pb2, registry_pb2_grpc
from tests.processes import Etcd, Process, Registry
from tests.waiting import PATIENCE_S

OK, DENIED = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED
DIGITS, OTHER, ADA = f"{EVALUATOR}/digits", f"{EVALUATOR}/other", f"{OPERATOR}/ada"
ROLES = (GATE, DIGITS, OTHER, ENVOY, REGISTRY, ADA, "etcd")
INSTANCE = registry_pb2.Instance(app="digits", version="v1", id="i", address="127.0.0.1:1", capacity=1)


@dataclass
class Secured:
    """A registry with TLS, and the authority of its mesh."""

    registry: Registry
    authority: Authority

    async def status(self, role: str, method: str, request: Any) -> grpc.StatusCode:
        """Return how a call ends for the holder of a certificate; a stream has succeeded with its first message."""
        async with transport.channel(self.registry.address, tls=Tls(self.authority.files(role))) as channel:
            following = registry_pb2_grpc.RegistryServiceStub(channel)
            stub = following if hasattr(following, method) else admin_pb2_grpc.AdminServiceStub(channel)
            try:
                call = getattr(stub, method)(request, timeout=PATIENCE_S)
                await (call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return OK

    async def allowed(self, method: str, request: Any) -> set[str]:
        """Return the roles that may make a call, which succeeds or finds nothing; all others are denied."""
        answers = {role: await self.status(role, method, request) for role in ROLES}
        assert set(answers.values()) <= {OK, DENIED, grpc.StatusCode.NOT_FOUND}, answers
        return {role for role, answer in answers.items() if answer is not DENIED}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, shared_etcd: Etcd) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder / "certs")
    for role in ROLES:
        authority.issue(role)
    registry = Registry(folder, [shared_etcd.address], *commands.tls(authority.files(REGISTRY)))
    try:
        registry.start()
        registry.logged(event="service ready")
        yield Secured(registry, authority)
    finally:
        registry.kill()


async def test_evaluators_of_an_app_alone_register_its_instances(secured: Secured) -> None:
    register = registry_pb2.RegisterInstanceRequest(instance=INSTANCE)
    assert await secured.allowed("RegisterInstance", register) == {DIGITS}
    deregister = registry_pb2.DeregisterInstanceRequest(instance=INSTANCE)
    assert await secured.allowed("DeregisterInstance", deregister) == {DIGITS}


async def test_gates_alone_follow_all_apps_and_report(secured: Secured) -> None:
    assert await secured.allowed("Watch", registry_pb2.WatchRequest()) == {GATE}
    assert await secured.allowed("ReportComparisons", registry_pb2.ReportComparisonsRequest(gate="g")) == {GATE}


async def test_evaluators_follow_their_app(secured: Secured) -> None:
    assert await secured.allowed("Watch", registry_pb2.WatchRequest(app="digits")) == {GATE, DIGITS}


async def test_operators_and_envoys_alone_operate(secured: Secured) -> None:
    assert await secured.allowed("ListApps", admin_pb2.ListAppsRequest()) == {ENVOY, ADA}
    write = admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app="digits", public=True))
    assert await secured.allowed("UpdateAccess", write) == {ENVOY, ADA}


async def test_with_named_operators_a_certificate_counts_as_its_entry_says(
    secured: Secured, shared_etcd: Etcd, tmp_path: Path, processes: Callable[[Process], Process]
) -> None:
    entry = {"name": "ada", "certificate": f"spiffe://atserving/{ADA}", "role": "publisher", "apps": ["digits"]}
    named = tmp_path / "operators.json"
    named.write_text(json.dumps({"operators": [entry]}))
    tls = commands.tls(secured.authority.files(REGISTRY))
    registry = Registry(tmp_path, [shared_etcd.address], *tls, "--operators", str(named))
    processes(registry)
    registry.logged(event="service ready")
    own = Secured(registry, secured.authority)
    write = admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app="digits", public=True))
    answers = {role: await own.status(role, "UpdateAccess", write) for role in ROLES}
    assert answers.pop(ADA) is OK
    assert set(answers.values()) == {grpc.StatusCode.UNAUTHENTICATED}
    write.access.app = "other"
    assert await own.status(ADA, "UpdateAccess", write) is DENIED


def command(secured: Secured, *arguments: str, home: Path, server: bool = True) -> subprocess.CompletedProcess[str]:
    named = {"ATSERVING_SERVER": secured.registry.address} if server else {}
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd()), "HOME": str(home), **named}
    program = [str(commands.BIN / "atserving"), *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=variables, timeout=PATIENCE_S)


def test_a_command_shows_the_certificate_of_its_flags_and_the_history_its_name(
    secured: Secured, tmp_path: Path
) -> None:
    flags = commands.tls(secured.authority.files(ADA))
    done = command(secured, "access", "set", "digits", "public=false", *flags, home=tmp_path)
    assert done.returncode == 0, done.stderr
    history = command(secured, "release", "history", "digits", "-o", "json", *flags, home=tmp_path)
    change = json.loads(history.stdout)["changes"][0]
    assert (change["actor"], change["actor_kind"]) == ("ada", "ACTOR_KIND_OPERATOR")


def test_a_context_keeps_the_certificate_for_its_registries(secured: Secured, tmp_path: Path) -> None:
    kept = commands.tls(secured.authority.files(ADA))
    set_ = ["context", "set", "here", "--server", secured.registry.address, *kept]
    assert command(secured, *set_, home=tmp_path, server=False).returncode == 0
    assert command(secured, "app", "list", home=tmp_path, server=False).returncode == 0
    # Other registries get none of it.
    assert command(secured, "app", "list", home=tmp_path).returncode == UNAVAILABLE


def test_commands_without_the_right_certificate_say_what_is_missing(secured: Secured, tmp_path: Path) -> None:
    def run(*flags: str) -> tuple[int, str]:
        ended = command(secured, "app", "list", *flags, home=tmp_path)
        return ended.returncode, ended.stderr

    status, said = run()
    assert (status, "One with TLS takes --tls-cert, --tls-key and --tls-ca" in said) == (UNAVAILABLE, True)
    status, said = run(*commands.tls(secured.authority.files(GATE)))
    assert (status, "spiffe://atserving/gate may not operate" in said) == (FORBIDDEN, True)
    status, said = run(*commands.tls(secured.authority.files(ADA))[:2])
    assert (status, "must be given together" in said) == (2, True)
    status, said = run("--tls-domain", "other", *commands.tls(secured.authority.files(ADA))[:-2])
    assert (status, "over TLS with the certificate of registry.other" in said) == (UNAVAILABLE, True)


async def test_probes_need_no_certificate(secured: Secured) -> None:
    port = secured.registry.logged(event="service ready")["http_port"]
    async with aiohttp.ClientSession() as session:
        for page, text in (("live", "live\n"), ("ready", "ready\n")):
            async with session.get(f"http://127.0.0.1:{port}/{page}") as answer:
                assert (answer.status, await answer.text()) == (200, text)
        async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            text = await answer.text()
    assert "atserving_registry_process_cpu_seconds_total" in text
    times = re.findall(r"^atserving_registry_certificate_(begins|expires)_seconds (\S+)$", text, re.MULTILINE)
    assert [name for name, _ in times] == ["begins", "expires"]
    begins, expires = (float(value) for _, value in times)
    assert begins < time.time() < expires


@pytest.mark.parametrize("module", ["gate", "registry", "evaluator"])
def test_a_service_does_not_start_with_a_certificate_of_another_role(
    secured: Secured, module: str, tmp_path: Path
) -> None:
    own = {
        "gate": commands.gate("127.0.0.1:1", "127.0.0.1:0"),
        "registry": commands.registry(["127.0.0.1:1"], "127.0.0.1:0"),
        "evaluator": commands.evaluator("127.0.0.1:1", "digits", "v1"),
    }[module]
    wrong = secured.authority.files(OTHER)

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*own, *flags], capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    ended = run(*commands.tls(wrong))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{module}: --tls-cert {wrong.cert} is for spiffe://atserving/evaluator/other")
    ended = run("--tls-ca", "x")
    assert (ended.returncode, "must be given together" in ended.stderr) == (2, True)
