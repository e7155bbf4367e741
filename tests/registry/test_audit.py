"""Each call of the API for operators that writes, or is refused, has a line in the audit log."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.http2_stream import Headers
from atserving.rpc import Context
from registry.audit import Audit, AuditFile
from tests.processes import Registry, running_registry
from tests.registry.test_operators import add, create
from tests.waiting import until

READ = admin_pb2.ListReleasesRequest(app="-")


class Audited:
    """A registry with an audit log, and its operators."""

    def __init__(self, registry: Registry, file: Path, tokens: dict[str, str]) -> None:
        self.registry = registry
        self.file = file
        self.tokens = tokens

    def call(self, method: str, request: Any, who: str = "", token: str = "") -> None:
        """Make a call, whatever its outcome."""
        shown = token or self.tokens.get(who, "")
        metadata = (("authorization", f"Bearer {shown}"),) if shown else ()
        with grpc.insecure_channel(self.registry.address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            try:
                answer = getattr(stub, method)(request, metadata=metadata, timeout=20)
                if method.startswith("Watch"):
                    list(answer)
            except grpc.RpcError:
                pass

    def flood(self, count: int) -> None:
        """Make so many calls at once as nobody, and wait for their refusals."""
        with grpc.insecure_channel(self.registry.address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            for call in [stub.ListReleases.future(READ, timeout=20) for _ in range(count)]:
                assert call.code() is grpc.StatusCode.UNAUTHENTICATED

    async def written(self, count: int, event: str = "admin call", path: Path | None = None) -> list[dict[str, Any]]:
        """Return the lines of the file once there are so many."""
        path = path or self.file

        def lines() -> list[dict[str, Any]]:
            text = path.read_text() if path.exists() else ""
            return [found for line in text.splitlines() if (found := json.loads(line))["event"] == event]

        await until(lambda: len(lines()) >= count, what=f"{count} lines of {event}")
        return lines()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    folder = tmp_path_factory.mktemp("audit")
    operators, file = folder / "operators.json", folder / "audit.log"
    tokens = {"ada": add(operators, "ada", "--role", "admin"), "vic": add(operators, "vic")}
    flags = ("--operators", str(operators), "--audit-log", str(file), "--log-level", "error")
    with running_registry(folder / "registry", *flags) as registry:
        yield Audited(registry, file, tokens)


@pytest.fixture
def audited(shared: Audited) -> Audited:
    """The registry of all tests, with an empty file."""
    os.truncate(shared.file, 0)
    return shared


async def test_writes_and_refusals_have_lines_and_reads_have_none(audited: Audited) -> None:
    audited.call("ListReleases", READ, "vic")
    audited.call("CreateRelease", create("digits", message="a first one", actor="claimed"), "ada")
    audited.call("CreateRelease", create("digits"), "vic")
    audited.call("CreateRelease", create("digits", version="v2", validate_only=True), "ada")
    audited.call("ListReleases", READ, token="not-a-token")
    audited.call("WatchApp", admin_pb2.WatchAppRequest(app="digits"))
    audited.call("DeleteRelease", admin_pb2.DeleteReleaseRequest(app="digits", version="v9"), "ada")
    new = admin_pb2.Operator(name="new", role=admin_pb2.ROLE_VIEWER, token_sha256="0" * 64)
    audited.call("PutOperator", admin_pb2.PutOperatorRequest(operator=new), "ada")
    wrote, forbidden, dry, unknown, watched, missing, operator = await audited.written(7)
    assert {**wrote, "timestamp": "", "revision": 0, "revision_before": 0} == {
        "event": "admin call",
        "service": "registry",
        "level": "info",
        "timestamp": "",
        "method": "CreateRelease",
        "app": "digits",
        "code": 200,
        "reason": "",
        "operator": "ada",
        "role": "admin",
        "known_by": "token",
        "address": "127.0.0.1",
        "message": "a first one",
        "keys": ["/ava/serving/eval/digits/v1"],
        "revision_before": 0,
        "revision": 0,
    }
    assert 0 < wrote["revision_before"] < wrote["revision"]
    assert (forbidden["code"], forbidden["operator"], "revision" in forbidden) == (403, "vic", False)
    assert (dry["code"], dry["validate_only"], "revision" in dry) == (200, True, False)
    assert (unknown["method"], unknown["code"], unknown["operator"]) == ("ListReleases", 401, "")
    assert (watched["method"], watched["code"], watched["address"]) == ("WatchApp", 401, "127.0.0.1")
    assert (missing["code"], "v9" in missing["reason"]) == (404, True)
    assert (operator["app"], operator["keys"]) == ("@operators", ["/ava/serving/operators/new"])
    # The log has the same lines, though its level is error; none has a secret.
    log = [line for line in audited.registry.lines if '"admin call"' in line]
    assert "\n".join(log) + "\n" == audited.file.read_text()
    text = audited.file.read_text()
    assert not [token for token in (*audited.tokens.values(), "not-a-token", "0" * 64) if token in text]
    assert stat.S_IMODE(audited.file.stat().st_mode) == 0o600


async def test_flood_of_refusals_is_bounded_and_told(audited: Audited) -> None:
    audited.flood(300)
    audited.call("CreateRelease", create("flood"), "ada")
    await audited.written(1, "admin calls left out")

    def counted() -> int:
        lines = [json.loads(line) for line in audited.file.read_text().splitlines()]
        return sum(line.get("count", line.get("code") == 401) for line in lines)

    await until(lambda: counted() == 300, what="each refusal has a line or is counted")
    lines = await audited.written(1)
    assert [line["operator"] for line in lines if line["code"] == 200] == ["ada"]


async def test_failed_calls_that_wrote_have_lines_in_a_flood(tmp_path: Path) -> None:
    """As of an operator whose deadline passes, or who leaves, just after the write."""
    audit = Audit(file := tmp_path / "audit.log")
    for number in range(100):
        who = {"operator": "ada", "known_by": "token", "role": "admin"}
        audit.ended("CreateRelease", create(f"app-{number}"), Context(Headers(), notes=who), 404, "no")
    notes = {**who, "revision_before": 3, "keys": ["/ava/serving/eval/app-100/v1"], "revision": 5}
    audit.ended("CreateRelease", create("app-100"), Context(Headers(), notes=notes), 504, "the deadline passed")
    await until(lambda: '"app-100"' in file.read_text(), what="the line of the write")
    assert file.read_text().count('"admin call"') == 21
    audit.turn()
    await until(lambda: '"count":80' in file.read_text(), what="the count of the others")


async def test_address_that_envoy_has_added_is_kept(tmp_path: Path) -> None:
    audit = Audit(file := tmp_path / "audit.log")
    headers = Headers([("x-forwarded-for", "10.0.0.1, " * 100 + "192.0.2.7")])
    audit.ended("CreateRelease", create("digits"), Context(headers), 200, "")
    await until(lambda: file.read_text().endswith("\n"), what="the line")
    assert json.loads(file.read_text())["forwarded_for"].endswith("10.0.0.1, 192.0.2.7")


def test_line_that_was_cut_off_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    for before, after in (('{"event": "on', '{"event": "on\n'), ("{", "{\n"), ("{}\n", "{}\n"), ("", "")):
        path = tmp_path / "audit.log"
        path.write_text(before)
        AuditFile(path)
        assert path.read_text() == after


async def test_file_that_is_moved_is_opened_again(audited: Audited) -> None:
    audited.call("CreateRelease", create("one"), "ada")
    await audited.written(1)
    moved = audited.file.with_suffix(".1")
    audited.file.rename(moved)
    os.kill(audited.registry.pid or 0, signal.SIGHUP)
    audited.call("CreateRelease", create("two"), "ada")
    assert [line["app"] for line in await audited.written(1)] == ["two"]
    assert [line["app"] for line in await audited.written(1, path=moved)] == ["one"]
    assert audited.registry.is_running


async def test_full_disk_is_told_and_stops_no_registry(audited: Audited) -> None:
    # It is larger than the log, so that the limit is not the log's.
    audited.file.write_text('{"event": "older"}\n' * 5000)
    audited.call("CreateRelease", create("full-one"), "ada")
    await audited.written(1)
    pid, unlimited = audited.registry.pid or 0, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    size = audited.file.stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    audited.call("CreateRelease", create("full-two"), "ada")
    failed = audited.registry.logged(event="audit log failed")
    assert (failed["level"], failed["path"]) == ("error", str(audited.file))
    audited.call("CreateRelease", create("full-three"), "ada")
    assert audited.file.stat().st_size == size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    assert [line["app"] for line in await audited.written(3)] == ["full-one", "full-two", "full-three"]
    audited.registry.logged(event="audit log back")


@pytest.mark.parametrize(
    ("name", "reason"), [("missing/audit.log", "No such file or directory"), ("pipe", "is no regular file")]
)
def test_file_that_can_not_be_written_ends_the_start(tmp_path: Path, name: str, reason: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    # With a reader, so that the pipe can be opened.
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    registry = Registry(tmp_path, ["127.0.0.1:1"], "--audit-log", str(tmp_path / name))
    registry.start()
    try:
        assert registry.wait() == 1
    finally:
        registry.kill()
        os.close(reader)
    (line,) = registry.lines
    assert reason in line
    assert "--audit-log" in line
