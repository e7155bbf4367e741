"""The local mesh reports why it does not start, and leaves no process behind."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from atserving.errors import StartError
from atserving.local import commands, examples, proc
from atserving.local.child import bound_to_parent
from atserving.local.mesh import Mesh
from tests.e2e.callers import documented
from tests.waiting import until

DIGITS_V1 = examples.DIGITS[:1]


def marked(mark: str) -> list[int]:
    """Return the processes that have a variable of their environment from one process, and run code."""
    found = []
    for each in proc.every_process():
        with suppress(OSError):
            if each.is_alive and mark.encode() in Path(f"/proc/{each.pid}/environ").read_bytes():
                found.append(each.pid)
    return found


@pytest.mark.parametrize(
    ("command", "line"), [("up", "Logs: "), ("up", "Waiting for instances of "), ("demo", "Ready after ")]
)
async def test_no_process_outlives_a_command_that_is_killed(command: str, line: str, tmp_path: Path) -> None:
    # Workers inherit few variables.
    mark = f"LC_TEST_MARK={secrets.token_hex(8)}"
    name, _, value = mark.partition("=")
    flags = ["--port", "0"] if command == "up" else ["--out", str(tmp_path / "drawn")]
    running = await asyncio.create_subprocess_exec(
        *bound_to_parent([str(commands.BIN / "atserving"), command, *flags]),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path), name: value},
    )
    assert running.stdout
    while not (said := (await running.stdout.readline()).decode()).startswith(line):
        assert said, f"{command} ended without the line"
    if line != "Waiting for instances of ":
        others = ["etcd", "registry", "gate", "envoy", "files"]
        assert len(marked(mark)) >= len([command, *others, *2 * examples.ALL])
    running.kill()
    await running.wait()
    await until(lambda: not marked(mark), "every process of the mesh has ended")


async def test_the_edge_opens_when_every_release_has_an_instance() -> None:
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", mesh.ports.edge)) == errno.ECONNREFUSED

    mesh = Mesh(serves=examples.DIGITS, tell=tell)
    async with mesh:
        pass
    assert told[:2] == ["Waiting for etcd and the registry ...", "Waiting for instances of digits v1, digits v2 ..."]
    assert told[-1] == "Waiting for Envoy and the gates ..."


async def test_a_mesh_that_does_not_start_tells_what_it_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Time enough for etcd and the registry, on a busy machine too.
    mesh = Mesh(serves=DIGITS_V1, start_timeout_s=15, extra={"evaluator-digits-v1": ["--no-such-flag"]})
    reason = "evaluator-digits-v1: evaluator: No such option"
    with pytest.raises(StartError, match=f"not ready within 15 s, waited for instances of digits v1: {reason}"):
        await mesh.__aenter__()
    assert not mesh.pids()


async def test_a_mesh_that_does_not_start_reports_the_last_log_line_of_a_process_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Without the pictures, no release can answer.
    mesh = Mesh(serves=DIGITS_V1, start_timeout_s=5, extra={"files": ["--no-such-flag"]})
    with pytest.raises(
        StartError, match=r"not ready within 5 s, waited for .+: .*files: files.py: error: .* --no-such-flag"
    ) as failed:
        await mesh.__aenter__()
    assert f"(logs: {mesh.directory}/*.log)" in str(failed.value)
    assert "--no-such-flag" in (mesh.directory / "files.log").read_text()
    assert not mesh.pids()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("", "", "Invalid path: {folder}/jwks.json"),
        ("audiences: [serving]", "audience: [serving]", "Protobuf message .* has unknown fields"),
    ],
    ids=["missing", "misspelt"],
)
async def test_a_wrong_file_of_callers_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, reason: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (folder := tmp_path / "callers").mkdir()
    (folder / "callers-jwt.yaml").write_text(documented("callers-jwt").replace(old, new))
    expected = f"--callers {folder}: Envoy rejects a file: {reason.format(folder=folder)}"
    with pytest.raises(StartError, match=expected):
        await Mesh(serves=DIGITS_V1, callers=folder).__aenter__()


async def test_a_port_in_use_is_reported_before_anything_starts() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(StartError, match=f"port {port} is in use: choose another with --port or PORT="):
        await Mesh(port).__aenter__()
    server.close()
