"""A registry knows operators by tokens, and refuses what their roles forbid: gRPC, REST and the command line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.cli.ops.client import FORBIDDEN
from atserving.local import commands
from atserving.local.mesh import Mesh
from tests.processes import Registry, running_registry
from tests.waiting import until, until_async

FILE = "file:///m.tar"
Status = grpc.StatusCode


def add(file: Path, name: str, *flags: str) -> str:
    """Add an operator to a file, as an administrator does; return the token."""
    return operator("add", name, "--file", str(file), *flags)


def operator(*arguments: str) -> str:
    """Run `atserving operator`, and return what it prints."""
    command = [str(commands.BIN / "atserving"), "operator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Api:
    """The operators' API of one registry, asked with a token."""

    def __init__(self, registry: Registry, file: Path, tokens: dict[str, str]) -> None:
        self.registry = registry
        self.file = file
        self.tokens = tokens

    def status(self, method: str, request: Any, who: str = "", token: str | None = None) -> Status:
        """Return the status of a call."""
        shown = self.tokens.get(who, "") if token is None else token
        metadata = (("authorization", f"Bearer {shown}"),) if shown else None
        with grpc.insecure_channel(self.registry.address, options=transport.CHANNEL_OPTIONS) as channel:
            try:
                getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(request, metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                return error.code()
        return Status.OK

    def history(self) -> list[tuple[str, str]]:
        """Return who has changed what, the newest first."""
        with grpc.insecure_channel(self.registry.address) as channel:
            changes = admin_pb2_grpc.AdminServiceStub(channel).ListHistory(
                admin_pb2.ListHistoryRequest(app="-"),
                metadata=(("authorization", f"Bearer {self.tokens['vic']}"),),
                timeout=20,
            )
        kinds = admin_pb2.Change.ActorKind
        return [(each.actor, kinds.Name(each.actor_kind).removeprefix("ACTOR_KIND_")) for each in changes.changes]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("operators")
    file = folder / "operators.json"
    tokens = {
        "ada": add(file, "ada", "--role", "admin"),
        "pat": add(file, "pat", "--role", "publisher", "--app", "digits", "--app", "team-*"),
        "vic": add(file, "vic"),
    }
    with running_registry(folder / "registry", "--operators", str(file)) as registry:
        yield Api(registry, file, tokens)


def create(app: str, version: str = "v1", **fields: Any) -> admin_pb2.CreateReleaseRequest:
    return admin_pb2.CreateReleaseRequest(release=admin_pb2.Release(app=app, version=version, file=FILE), **fields)


READ = ("ListReleases", admin_pb2.ListReleasesRequest(app="-"))
ALL_APPS = admin_pb2.UpdateWorkerRequest(worker=admin_pb2.Worker(max_concurrent=7))
# The method, the request, and who may make it.
CALLS = [
    (*READ, {"ada", "pat", "vic"}),
    ("ListHistory", admin_pb2.ListHistoryRequest(app="-"), {"ada", "pat", "vic"}),
    ("GetStatus", admin_pb2.GetStatusRequest(), {"ada", "pat", "vic"}),
    ("CreateRelease", create("digits"), {"ada", "pat"}),
    ("CreateRelease", create("team-a"), {"ada", "pat"}),
    ("CreateRelease", create("digits2"), {"ada"}),
    ("CreateRelease", create("other", validate_only=True), {"ada", "pat", "vic"}),
    ("UpdateAccess", admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app="digits", public=True)), {"ada", "pat"}),
    ("UpdateAccess", admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(app="other", public=True)), {"ada"}),
    ("UpdateAccess", admin_pb2.UpdateAccessRequest(access=admin_pb2.Access(public=True)), {"ada"}),
    ("UpdateWorker", ALL_APPS, {"ada"}),
    ("ApplyConfig", admin_pb2.ApplyConfigRequest(app="", prune=True), {"ada"}),
    ("UpdateApp", admin_pb2.UpdateAppRequest(app=admin_pb2.App(name="digits", key_header="x-user")), {"ada", "pat"}),
    ("UpdateApp", admin_pb2.UpdateAppRequest(app=admin_pb2.App(name="other", key_header="x-user")), {"ada"}),
    ("AcceptDeletions", admin_pb2.AcceptDeletionsRequest(), {"ada"}),
    ("AcceptDeletions", admin_pb2.AcceptDeletionsRequest(validate_only=True), {"ada", "pat", "vic"}),
]


@pytest.mark.parametrize(
    ("method", "request_", "allowed"), CALLS, ids=lambda each: each if isinstance(each, str) else ""
)
def test_roles(api: Api, method: str, request_: Any, allowed: set[str]) -> None:
    assert api.status(method, request_) is Status.UNAUTHENTICATED
    for who in ("vic", "pat", "ada"):
        assert api.status(method, request_, who) is (Status.OK if who in allowed else Status.PERMISSION_DENIED)


def test_every_method_wants_to_know_who_asks(api: Api) -> None:
    for method in admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods:
        if not method.server_streaming:
            request = getattr(admin_pb2, method.input_type.name)()
            assert api.status(method.name, request) is Status.UNAUTHENTICATED
            assert api.status(method.name, request, token="x") is Status.UNAUTHENTICATED
    with grpc.insecure_channel(api.registry.address) as channel:
        watching = admin_pb2_grpc.AdminServiceStub(channel).WatchApp(admin_pb2.WatchAppRequest(app="-"), timeout=20)
        with pytest.raises(grpc.RpcError):
            list(watching)
        assert watching.code() is Status.UNAUTHENTICATED


def test_health_and_reflection_are_open(api: Api) -> None:
    with grpc.insecure_channel(api.registry.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=20)
        names = [each.name for each in next(answers).list_services_response.service]
    assert "atserving.admin.v1.AdminService" in names


@pytest.mark.parametrize("shown", ["{}", "{}x", "Basic {}", "Bearer", "Bearer ", "Bearer {} x"])
def test_only_a_whole_token_counts(api: Api, shown: str) -> None:
    text = shown.replace("{}", api.tokens["ada"])
    with grpc.insecure_channel(api.registry.address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        metadata = (("authorization", text),)
        with pytest.raises(grpc.RpcError, match="the registry does not know this token"):
            stub.GetStatus(admin_pb2.GetStatusRequest(), metadata=metadata, timeout=20)


async def test_the_history_says_who_it_was_and_not_who_they_say(api: Api) -> None:
    assert api.status("CreateRelease", create("team-b", actor="ada", message="why"), "pat") is Status.OK
    assert api.history()[0] == ("pat", "OPERATOR")
    api.registry.put("eval/team-b/v2", {"file": FILE})

    await until(lambda: api.history()[0] == ("", "ETCD"))


def test_the_file_is_followed(api: Api) -> None:
    token = add(api.file, "new", "--role", "admin")
    assert api.status(*READ, token=token) is Status.OK
    again = operator("set", "new", "--new-token", "--file", str(api.file))
    assert api.status(*READ, token=token) is Status.UNAUTHENTICATED
    assert api.status(*READ, token=again) is Status.OK
    good = api.file.read_text()
    api.file.write_text("{")
    assert api.status(*READ, token=again) is Status.OK
    api.registry.logged(event="operators unchanged")
    api.file.write_text(good)
    assert operator("remove", "new", "--file", str(api.file)) == "new is removed"
    assert api.status(*READ, token=again) is Status.UNAUTHENTICATED
    # Neither the file nor the logs have a token.
    assert api.file.stat().st_mode & 0o077 == 0
    shown = api.file.read_text() + api.registry.log_text()
    assert not [each for each in (*api.tokens.values(), token, again) if each in shown]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("add", "a b"), "name"),
        (("add", "bob", "--role", "publisher", "--app", "te am"), "apps"),
        (("add", "bob", "--issuer", "company", "--subject", "bob@example.com"), "there is no issuer 'company'"),
        (("set", "ada", "--certificate", "no URI"), "certificate"),
    ],
)
def test_commands_write_no_file_that_registries_refuse(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    path = tmp_path / "operators.json"
    add(path, "ada", "--role", "admin")
    before = path.read_text()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        operator(*arguments, "--file", str(path))
    assert (refused.value.stdout, reason in refused.value.stderr) == ("", True)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_who_can_read_the_file_can_read_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    add(path, "ada", "--role", "admin")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1, 1)
    before = path.stat()
    add(path, "rescue", "--role", "admin")
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Input data was truncated"),
        ('{"operators": [{"name": "a"}]}', "token_sha256"),
        ('{"operators": [{"name": "a", "token_sha256": "x", "role": "root"}]}', "token_sha256"),
        (
            json.dumps({"operators": [{"name": n, "token_sha256": "0" * 64} for n in "ab"]}),
            "operators have the same token",
        ),
        ('{"operators": [], "roles": []}', "unknown field"),
    ],
)
def test_a_wrong_file_stops_the_start(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "operators.json"
    path.write_text(text)
    command = [*commands.registry(["127.0.0.1:1"], "127.0.0.1:0"), "--operators", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, reason in ended.stderr.splitlines()[-1]) == (1, True)


def run(api: Api, home: Path, *arguments: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    return subprocess.run(
        [str(commands.BIN / "atserving"), *arguments],
        capture_output=True,
        text=True,
        input=text,
        check=False,
        timeout=60,
        env={**environment, **variables},
    )


def test_a_context_keeps_the_token_for_its_registries(api: Api, tmp_path: Path) -> None:
    server = api.registry.address
    assert run(api, tmp_path, "context", "set", "here", "--server", server).returncode == 0
    refused = run(api, tmp_path, "release", "list")
    assert (refused.returncode, "run atserving login" in refused.stderr) == (FORBIDDEN, True)
    wrong = run(api, tmp_path, "login", text="wrong\n")
    assert (wrong.returncode, "does not know this token" in wrong.stderr) == (FORBIDDEN, True)
    assert run(api, tmp_path, "login", text=f"{api.tokens['pat']}\n").stdout == (
        "you are pat (publisher of digits, team-*) in here\n"
    )
    file = tmp_path / ".config" / "atserving" / "config.json"
    assert file.stat().st_mode & 0o077 == 0
    assert run(api, tmp_path, "release", "list").returncode == 0
    forbidden = run(api, tmp_path, "worker", "set", "max_concurrent=3")
    assert (forbidden.returncode, "pat is publisher, and may not change what all apps share" in forbidden.stderr) == (
        FORBIDDEN,
        True,
    )
    assert run(api, tmp_path, "worker", "set", "max_concurrent=3", ATSERVING_TOKEN=api.tokens["ada"]).returncode == 0
    # Nobody else gets the token.
    assert (
        run(api, tmp_path, "release", "list", "--server", f"localhost:{server.partition(':')[2]}").returncode
        == FORBIDDEN
    )
    assert run(api, tmp_path, "context", "set", "here", "--server", f"{server},127.0.0.1:1").returncode == 0
    assert api.tokens["pat"] not in file.read_text()
    assert run(api, tmp_path, "login", text=api.tokens["pat"]).returncode == 0
    assert run(api, tmp_path, "logout").stdout == "here has no token\n"
    assert run(api, tmp_path, "release", "list").returncode == FORBIDDEN


async def test_rest_wants_to_know_who_asks(api: Api) -> None:
    flags = {"registry": ["--operators", str(api.file)]}
    async with Mesh(serves=(), extra=flags) as mesh, aiohttp.ClientSession() as session:
        url = f"{mesh.operators_url}/v1/apps"

        bearer = {"authorization": f"Bearer {api.tokens['vic']}"}

        async def answers() -> bool:
            async with session.get(url, headers=bearer) as response:
                return response.status == 200

        await until_async(answers, aiohttp.ClientError)
        async with session.get(url) as response:
            body = await response.json()
            assert (response.status, response.headers["www-authenticate"], body["code"]) == (401, "Bearer", 401)
        async with session.delete(f"{url}/digits?force=true", headers=bearer) as response:
            assert (response.status, (await response.json())["code"]) == (403, 403)
        async with session.delete(f"{url}/digits?validate_only=true", headers=bearer) as response:
            assert response.status == 404
        await _operators_over_rest(api, session, mesh.operators_url)


async def _operators_over_rest(api: Api, session: aiohttp.ClientSession, url: str) -> None:
    """Operators are objects as others are."""

    async def call(method: str, path: str, who: str = "ada", body: Any = None) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {api.tokens[who]}"}
        async with session.request(method, f"{url}{path}", json=body, headers=headers) as response:
            return response.status, await response.json()

    assert await call("GET", "/v1/self", "pat") == (
        200,
        {"name": "pat", "role": "ROLE_PUBLISHER", "apps": ["digits", "team-*"]},
    )
    zoe = {"name": "zoe+x@example.com", "role": "ROLE_VIEWER", "token_sha256": "0" * 64}
    assert (await call("POST", "/v1/operators", "pat", zoe))[0] == 403
    assert (await call("POST", "/v1/operators?validate_only=true&message=why", "pat", zoe))[0] == 200
    path = f"/v1/operators/{zoe['name']}"
    status, made = await call("POST", "/v1/operators?message=why", "ada", zoe)
    assert (status, made["has_token"], "token_sha256" in made) == (200, True, False)
    _, listed = await call("GET", "/v1/operators?page_size=1000", "vic")
    assert [each["name"] for each in listed["operators"]] == sorted([zoe["name"], *api.tokens])
    assert (await call("DELETE", path, "vic"))[0] == 403
    assert (await call("DELETE", path))[0] == 200
    assert (await call("DELETE", path))[0] == 404
