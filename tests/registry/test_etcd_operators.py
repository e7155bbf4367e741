"""Operators that are kept in etcd: admins change them through the API, and every registry follows."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from atserving import transport
from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.cli.ops.client import FORBIDDEN, INVALID, NOT_FOUND, REFUSED
from atserving.config import HISTORY, OPERATORS
from atserving.v1 import registry_pb2, registry_pb2_grpc
from tests.processes import Registry, cluster
from tests.registry.cli import Cli, Ended
from tests.waiting import until

Status = grpc.StatusCode
CONFLICT = 4
ISSUER = {"name": "company", "issuer": "https://login.example", "audience": "atserving", "jwks": "https://127.0.0.1:1/"}


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def entry(name: str, role: str = "viewer", **fields: Any) -> dict[str, Any]:
    """Return an operator whose token is its name."""
    return {"name": name, "role": role, "token_sha256": digest(name), **fields}


@dataclass
class Mesh:
    """Two registries of one etcd with the same file of operators, and one with an empty file."""

    first: Registry
    second: Registry
    empty: Registry
    home: Path
    reason: str = ""
    answer: Any = None
    """What the last call answered, or why not."""

    def status(self, method: str, request: Any, token: str, registry: Registry | None = None) -> Status:
        """Return the status of a call."""
        metadata = (("authorization", f"Bearer {token}"),)
        address = (registry or self.first).address
        with grpc.insecure_channel(address, options=transport.CHANNEL_OPTIONS) as channel:
            try:
                call = getattr(admin_pb2_grpc.AdminServiceStub(channel), method)
                self.answer = call(request, metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                self.reason = error.details() or ""
                return error.code()
        return Status.OK

    def put(self, token: str, registry: Registry | None = None, **fields: Any) -> Status:
        """Put an operator, as somebody with a token."""
        request = admin_pb2.PutOperatorRequest(operator=admin_pb2.Operator(**fields))
        return self.status("PutOperator", request, token, registry)

    def delete(self, token: str, name: str, registry: Registry | None = None) -> Status:
        return self.status("DeleteOperator", admin_pb2.DeleteOperatorRequest(name=name), token, registry)

    def who(self, token: str, registry: Registry) -> str:
        """Return who has a token, and what they may do; empty: nobody."""
        if self.status("GetSelf", admin_pb2.GetSelfRequest(), token, registry) is not Status.OK:
            return ""
        role = admin_pb2.Role.Name(self.answer.role).removeprefix("ROLE_").lower()
        return " ".join([self.answer.name, role, *self.answer.apps])

    def etcdctl(self, name: str, text: str) -> None:
        self.first.etcdctl("put", OPERATORS + name, text)

    async def known(self, token: str, who: str, *registries: Registry) -> None:
        """Wait until registries know a token as somebody's."""
        for registry in registries or (self.first, self.second):
            await until(lambda registry=registry: self.who(token, registry) == who)  # type: ignore[misc]

    def run(self, *arguments: str, token: str = "ada") -> Ended:
        """Run `atserving` as somebody with a token; without one, as the context says."""
        server = {"ATSERVING_SERVER": self.first.address} if token else {}
        file = {"ATSERVING_CONFIG": str(self.home / "config.json")}
        return Cli("", "").run(*arguments, **server, **file, ATSERVING_TOKEN=token)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("operators")
    file, empty = folder / "operators.json", folder / "empty.json"
    file.write_text(json.dumps({"operators": [entry("ada", "admin"), entry("vic")], "issuers": [ISSUER]}))
    empty.write_text("{}")
    (etcd,) = cluster(folder, ["one"])
    registries = [Registry(folder, [etcd.address], "--operators", str(each)) for each in (file, file, empty)]
    try:
        etcd.start()
        for registry in registries:
            registry.start()
        for registry in registries:
            registry.wait_serving()
        first, second, third = registries
        yield Mesh(first, second, third, folder)
    finally:
        for process in (*registries, etcd):
            process.kill()


async def test_an_admin_adds_changes_and_removes_operators_of_all_registries(mesh: Mesh) -> None:
    fields: dict[str, Any] = {"role": admin_pb2.ROLE_PUBLISHER, "apps": ["digits", "team-*"]}
    assert mesh.put("ada", name="pat", token_sha256=digest("pat"), **fields) is Status.OK
    assert (mesh.answer.has_token, mesh.answer.token_sha256, mesh.answer.in_file) == (True, "", False)
    # The registry that took it knows it at once.
    assert mesh.who("pat", mesh.first) == "pat publisher digits team-*"
    await mesh.known("pat", "pat publisher digits team-*")
    assert mesh.status("ListProblems", admin_pb2.ListProblemsRequest(app="-"), "ada") is Status.OK
    assert not mesh.answer.problems
    # Without a token, it keeps the one it has.
    assert mesh.put("ada", mesh.second, name="pat", role=admin_pb2.ROLE_VIEWER) is Status.OK
    await mesh.known("pat", "pat viewer")
    assert mesh.put("ada", name="pat", token_sha256=digest("new"), etag="0") is Status.ABORTED
    assert mesh.put("ada", name="pat", token_sha256=digest("new"), etag=mesh.answer.etag) is Status.OK
    await mesh.known("new", "pat viewer")
    assert (mesh.who("pat", mesh.first), mesh.who("pat", mesh.second)) == ("", "")
    assert mesh.delete("ada", "pat") is Status.OK
    await mesh.known("new", "")
    assert mesh.delete("ada", "pat") is Status.NOT_FOUND


def test_only_admins_change_operators(mesh: Mesh) -> None:
    publisher: dict[str, Any] = {"role": admin_pb2.ROLE_PUBLISHER, "apps": ["*"]}
    assert mesh.put("ada", name="max", token_sha256=digest("max"), **publisher) is Status.OK
    admin: dict[str, Any] = {"name": "max", "role": admin_pb2.ROLE_ADMIN}
    for token, status in (
        ("max", Status.PERMISSION_DENIED),
        ("vic", Status.PERMISSION_DENIED),
        ("x", Status.UNAUTHENTICATED),
    ):
        assert mesh.put(token, **admin) is status
        assert mesh.delete(token, "max") is status
    # Nor by the back doors: the config of apps, and the rollback.
    values = {OPERATORS + "max": json.dumps(entry("max", "admin"))}
    for app, token in (("digits", "max"), ("digits", "ada"), ("", "ada")):
        apply = admin_pb2.ApplyConfigRequest(app=app, values=values)
        assert mesh.status("ApplyConfig", apply, token) is Status.INVALID_ARGUMENT
    assert mesh.who("max", mesh.first) == "max publisher *"
    # A dry run changes nothing, and everybody may try.
    request = admin_pb2.PutOperatorRequest(operator=admin_pb2.Operator(**admin), validate_only=True)
    assert mesh.status("PutOperator", request, "vic") is Status.OK
    assert mesh.who("max", mesh.first) == "max publisher *"
    assert mesh.delete("ada", "max") is Status.OK


async def test_the_file_decides_about_its_operators(mesh: Mesh) -> None:
    for change in (mesh.put("ada", name="ada", token_sha256=digest("x")), mesh.delete("ada", "ada")):
        assert (change, "file of operators" in mesh.reason) == (Status.FAILED_PRECONDITION, True)
    assert mesh.put("ada", name="eve", token_sha256=digest("ada")) is Status.FAILED_PRECONDITION
    # What somebody writes to etcd neither adds a token to one of the file, nor takes the role away.
    mesh.etcdctl("ada", json.dumps(entry("ada", "viewer", token_sha256=digest("other"))))
    mesh.etcdctl("eve", json.dumps(entry("eve", "viewer", token_sha256=digest("ada"))))
    mesh.etcdctl("last", json.dumps(entry("last")))
    await mesh.known("last", "last viewer")
    for registry in (mesh.first, mesh.second):
        assert mesh.who("other", registry) == ""
        assert mesh.who("ada", registry) == "ada admin"
    # All of etcd's go at once, and nothing holds that back.
    mesh.first.etcdctl("del", "--prefix", OPERATORS)
    await mesh.known("last", "")
    assert mesh.who("ada", mesh.second) == "ada admin"


async def test_an_admin_is_left(mesh: Mesh) -> None:
    mesh.etcdctl("one", json.dumps(entry("one", "admin")))
    await mesh.known("one", "one admin", mesh.empty)
    viewer: dict[str, Any] = {"name": "one", "role": admin_pb2.ROLE_VIEWER}
    for change in (mesh.put("one", mesh.empty, **viewer), mesh.delete("one", "one", mesh.empty)):
        assert (change, "last admin" in mesh.reason) == (Status.FAILED_PRECONDITION, True)
    assert mesh.put("one", mesh.empty, name="two", role=admin_pb2.ROLE_ADMIN, token_sha256=digest("two")) is Status.OK
    # Each of two removes the other one, at the same time.
    both = [asyncio.to_thread(mesh.delete, each, name, mesh.empty) for each, name in (("one", "two"), ("two", "one"))]
    found = await asyncio.gather(*both)
    assert sorted(each.name for each in found if each is not Status.OK) in (
        ["FAILED_PRECONDITION"],
        ["UNAUTHENTICATED"],
    )
    left = [each for each in ("one", "two") if mesh.who(each, mesh.empty)]
    assert len(left) == 1
    # A registry whose file has an admin may take the last one of etcd.
    assert mesh.delete("ada", left[0]) is Status.OK


async def test_a_malformed_entry_knows_nobody_and_is_named(mesh: Mesh) -> None:
    mesh.etcdctl("zoe", json.dumps(entry("zoe")))
    await mesh.known("zoe", "zoe viewer")
    for text in ("{", json.dumps(entry("other")), json.dumps(entry("zoe", "root")), json.dumps(entry("zoe", more=1))):
        mesh.etcdctl("zoe", text)
        await mesh.known("zoe", "")
        assert mesh.status("ListProblems", admin_pb2.ListProblemsRequest(app="-"), "ada") is Status.OK
        problems = admin_pb2.ListProblemsResponse
        assert [(each.kind, each.key) for each in mesh.answer.problems] == [
            (problems.KIND_MALFORMED, OPERATORS + "zoe")
        ]
    mesh.first.logged(event="config skipped", key=OPERATORS + "zoe")
    assert mesh.put("ada", name="zoe") is Status.INVALID_ARGUMENT
    assert mesh.put("ada", name="zoe", token_sha256=digest("zoe")) is Status.OK
    await mesh.known("zoe", "zoe viewer")
    assert mesh.delete("ada", "zoe") is Status.OK


async def test_neither_gates_nor_evaluators_see_operators(mesh: Mesh) -> None:
    mesh.etcdctl("tom", json.dumps(entry("tom")))
    await mesh.known("tom", "tom viewer")
    mesh.etcdctl("tom", "{")
    await mesh.known("tom", "")
    mesh.first.publish("digits")
    for app in ("", "digits"):
        with grpc.insecure_channel(mesh.first.address) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            step = next(iter(stub.Watch(registry_pb2.WatchRequest(app=app), timeout=20)))
        keys = [each.key for each in step.upserts]
        assert keys
        assert not [key for key in keys if key.startswith(OPERATORS)]
    mesh.first.etcdctl("del", OPERATORS + "tom")


async def test_the_history_says_who_changed_operators_and_shows_no_digest(mesh: Mesh) -> None:
    assert mesh.put("ada", name="kim", token_sha256=digest("kim")) is Status.OK
    assert mesh.put("ada", name="kim", token_sha256=digest("kim2")) is Status.OK
    mesh.etcdctl("kim", json.dumps({**entry("kim"), "token": "plain"}))
    assert mesh.delete("ada", "kim") is Status.OK

    def changes() -> list[tuple[str, str, str, str]]:
        assert mesh.status("ListHistory", admin_pb2.ListHistoryRequest(app="@operators"), "vic") is Status.OK
        found = [each for each in mesh.answer.changes if each.keys[0].key == OPERATORS + "kim"]
        return [(each.actor, each.method, each.keys[0].before, each.keys[0].after) for each in found]

    shown = '{"name":"kim","role":"viewer"}'
    wanted = [
        ("ada", "DeleteOperator", "", ""),
        ("", "", shown, ""),
        ("ada", "PutOperator", shown, shown),
        ("ada", "PutOperator", "", shown),
    ]
    await until(lambda: changes() == wanted)
    kept = mesh.first.etcdctl("get", "--prefix", HISTORY)
    assert "kim" in kept
    logs = mesh.first.log_text() + mesh.second.log_text()
    assert not [each for each in (digest("kim"), digest("kim2"), digest("ada"), "plain") if each in kept + logs]
    # A rollback of the defaults takes no operator back.
    rollback = admin_pb2.RollbackAppRequest()
    assert mesh.status("RollbackApp", rollback, "ada") is Status.NOT_FOUND
    assert mesh.status("RollbackApp", admin_pb2.RollbackAppRequest(app="@operators"), "ada") is Status.INVALID_ARGUMENT


WRONG = [
    ({"name": "a/b", "token_sha256": digest("x")}, "name"),
    ({"name": "", "token_sha256": digest("x")}, "name"),
    ({"name": "new"}, "should have one of"),
    ({"name": "new", "token_sha256": "x"}, "token_sha256"),
    ({"name": "new", "token_sha256": digest("x"), "certificate": "spiffe://a/b"}, "should have one of"),
    ({"name": "new", "certificate": "ada"}, "certificate"),
    ({"name": "new", "issuer": "company"}, "should have one of"),
    ({"name": "new", "subject": "x"}, "issuer goes with"),
    ({"name": "new", "issuer": "other", "subject": "x"}, "has no issuer 'other'"),
    ({"name": "new", "token_sha256": digest("x"), "role": admin_pb2.ROLE_PUBLISHER}, "a publisher has apps"),
    ({"name": "new", "token_sha256": digest("x"), "apps": ["digits"]}, "a publisher has apps"),
    ({"name": "new", "token_sha256": digest("x"), "role": admin_pb2.ROLE_PUBLISHER, "apps": ["a*b"]}, "apps"),
    ({"name": "new", "token_sha256": digest("x"), "role": 9}, "role"),
]


@pytest.mark.parametrize(("fields", "reason"), WRONG)
def test_a_wrong_operator_is_refused(mesh: Mesh, fields: dict[str, Any], reason: str) -> None:
    assert mesh.put("ada", **fields) is Status.INVALID_ARGUMENT
    assert reason in mesh.reason


async def test_a_stream_ends_when_its_operator_is_gone(mesh: Mesh) -> None:
    assert mesh.put("ada", name="sam", token_sha256=digest("sam")) is Status.OK
    await mesh.known("sam", "sam viewer")
    async with transport.channel(mesh.second.address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        metadata = (("authorization", "Bearer sam"),)
        watching = stub.WatchApp(admin_pb2.WatchAppRequest(app="-"), metadata=metadata, timeout=60)
        while not (await anext(aiter(watching))).synced:
            pass
        assert mesh.delete("ada", "sam") is Status.OK

        async def heard() -> None:
            async for _ in watching:
                pass

        hearing = asyncio.create_task(heard())
        # Each change is a message, and the first one after a second ends the stream.
        for number in range(1000):
            mesh.first.put("eval/streamed/v1", {"file": "file:///m.tar", "desc": str(number)})
            if (await asyncio.wait([hearing], timeout=0.05))[0]:
                break
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await hearing
        assert ended.value.code() is Status.UNAUTHENTICATED


def test_the_command_line_keeps_operators(mesh: Mesh) -> None:
    added = mesh.run("operator", "add", "lea", "--role", "publisher", "--app", "digits", "-m", "new here")
    assert (added.status, added.err) == (0, "")
    token = added.out.strip()
    assert mesh.who(token, mesh.first) == "lea publisher digits"
    assert mesh.run("operator", "add", "lea").status == CONFLICT
    eyes = ["--issuer", "company", "--group", "eyes", "--role", "publisher", "--app", "eyes-*"]
    group = mesh.run("operator", "add", "vision", *eyes)
    assert (group.out, group.err) == ("vision is added\n", "")
    assert mesh.run("operator", "add", "bot", "--certificate", "spiffe://atserving/operator/bot").status == 0
    listed = [line.split(maxsplit=1) for line in mesh.run("operator", "list", token="vic").out.splitlines()]
    assert [name for name, _ in listed] == ["NAME", "ada", "bot", "lea", "vic", "vision"]
    rest = {name: " ".join(rest.split()) for name, rest in listed}
    assert rest["ada"] == "admin token file"
    assert rest["bot"] == "viewer spiffe://atserving/operator/bot etcd"
    assert rest["lea"] == "publisher of digits token etcd"
    assert rest["vision"] == "publisher of eyes-* company group eyes etcd"
    assert mesh.run("operator", "set", "lea", "--app", "team-*").out == "lea is changed\n"
    assert mesh.who(token, mesh.first) == "lea publisher team-*"
    dry = mesh.run("operator", "set", "lea", "--role", "admin", "--dry-run", token=token)
    assert dry.out == "lea is changed (dry run: nothing is changed)\n"
    refused = mesh.run("operator", "set", "lea", "--role", "admin", token=token)
    assert (refused.status, "lea is publisher, and may not change who may operate" in refused.err) == (
        FORBIDDEN,
        True,
    )
    assert mesh.run("operator", "set", "lea", "--role", "viewer").status == 0
    new = mesh.run("operator", "set", "lea", "--new-token").out.strip()
    assert (mesh.who(token, mesh.first), mesh.who(new, mesh.first)) == ("", "lea viewer")
    assert mesh.run("operator", "add", "x", "--issuer", "none", "--subject", "x").status == INVALID
    assert mesh.run("operator", "add", "x", "--issuer", "company").status == 2
    assert mesh.run("operator", "set", "none", "--role", "viewer").status == NOT_FOUND
    assert mesh.run("operator", "set", "ada", "--role", "viewer").status == REFUSED
    for name in ("lea", "vision", "bot"):
        assert mesh.run("operator", "remove", name).out == f"{name} is removed\n"
    assert mesh.run("operator", "remove", "lea").status == NOT_FOUND
    history = mesh.run("release", "history", "@operators", token="vic").out
    assert "new here" in history


def test_a_context_may_have_a_command_for_tokens(mesh: Mesh) -> None:
    secret = mesh.home / "secret"
    secret.write_text("ada\n")
    assert mesh.run("context", "set", "here", "--server", mesh.first.address).status == 0

    def login(*flags: str) -> tuple[str, str]:
        ended = mesh.run("login", *flags, token="")
        return ended.out, ended.err

    assert login("--token-file", str(secret)) == ("you are ada (admin) in here\n", "")
    assert login("--token-command", f"cat {secret}") == ("you are ada (admin) in here\n", "")
    assert '"token"' not in (mesh.home / "config.json").read_text()

    def listed() -> tuple[int, str]:
        ended = mesh.run("operator", "list", token="")
        return ended.status, ended.err

    assert listed()[0] == 0
    secret.write_text("expired\n")
    assert (listed()[0], "does not know this token" in listed()[1]) == (FORBIDDEN, True)
    secret.write_text("\n")
    assert (listed()[0], "prints nothing" in listed()[1]) == (1, True)
    secret.unlink()
    assert (listed()[0], "the command that prints the token has failed" in listed()[1]) == (1, True)
    assert mesh.run("logout", token="").status == 0
    assert listed()[0] == FORBIDDEN
    assert "has failed" in login("--token-command", "/none/such")[1]
    assert "exclude each other" in login("--token-command", "x", "--token-file", "y")[1]
    assert "there is no token" in login()[1]
