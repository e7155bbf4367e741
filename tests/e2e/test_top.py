"""`atserving top` shows a running mesh, and `atserving logs` the lines of one of its requests."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from atserving.local import examples
from atserving.local.folders import PREFIX, TARGETS_FILE
from atserving.local.mesh import Mesh
from tests.e2e.client import Client, image

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOP = "from atserving.cli.top.command import top as command"
LOGS = "from atserving.cli.logs import logs as command"


def line_of(command: str, *arguments: str) -> list[str]:
    code = f"{command}\nfrom atserving.cli import service\nservice.run(command, 'atserving')"
    return [sys.executable, "-c", code, *arguments]


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(examples.ROOT), "TMPDIR": str(folder), "TERM": "xterm"}


async def run(command: str, *arguments: str, tmp: Path, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run a command that looks for local meshes in a folder."""
    process = await asyncio.create_subprocess_exec(
        *line_of(command, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(tmp),
    )
    stdout, stderr = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


@asynccontextmanager
async def load(client: Client) -> AsyncIterator[None]:
    """Call a net again and again."""

    async def call() -> None:
        while True:
            await client.bytes("/v1/eval/digits", image("7.png"))
            await client.bytes("/v1/eval/digits/no-such", image("7.png"))

    calling = asyncio.create_task(call())
    try:
        yield
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)


def only(folder: Path, *meshes: Mesh) -> Path:
    """Return a folder in which a command finds these meshes, and no others that run on this machine."""
    for number, each in enumerate(meshes):
        (folder / f"{PREFIX}{number}").symlink_to(each.directory)
    return folder


def loads(document: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = json.loads(document)["loads"]
    return {(each["app"], each.get("version", ""), each.get("instance", "")): each for each in found if "app" in each}


async def test_a_mesh_under_load(mesh: Mesh, client: Client, tmp_path: Path) -> None:
    async with load(client):
        status, out, err = await run(TOP, "--once", "--interval", "0.5", "-o", "json", tmp=only(tmp_path, mesh))
    assert (status, err) == (0, "")
    assert json.loads(out)["processes"] == {"gate": 1, "registry": 1, "evaluator": 2}
    found = loads(out)
    app, version = found["digits", "", ""], found["digits", "v1", ""]
    instance = found["digits", "v1", "evaluator-digits-v1"]
    assert app["requests_per_s"] > version["requests_per_s"] > 0
    assert app["refused_per_s"] > 0
    assert version["errors_per_s"] == 0
    assert (version["ready"], version["registered"]) == (1, 1)
    for each in (app, version, instance):
        assert 0 < each["p50_ms"] <= each["p99_ms"]
    for each in (version, instance):
        assert each["batch"] >= 1
        assert each["capacity"] > 0
        assert each["restarts"] == 0


async def test_a_table_of_one_app(mesh: Mesh, tmp_path: Path) -> None:
    _, out, _ = await run(TOP, "digits", "-i", "--interval", "0.2", tmp=only(tmp_path, mesh))
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][:3] == ["APP", "VERSION", "READY"]
    assert [line[0] for line in lines[2:]] == ["digits", "v1", "evaluator-digits-v1", "v2", "evaluator-digits-v2"]
    _, out, _ = await run(TOP, "other", "--interval", "0.2", tmp=tmp_path)
    assert len(out.splitlines()) == 2


async def test_the_screen_of_a_terminal(mesh: Mesh, tmp_path: Path) -> None:
    main, side = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *line_of(TOP, "--interval", "0.2"), stdin=side, stdout=side, stderr=side, env=environment(only(tmp_path, mesh))
    )
    os.close(side)
    shown = b""

    async def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += await asyncio.to_thread(os.read, main, 4096)

    try:
        await asyncio.wait_for(until(b"requests/s in the last"), 20)
        assert b"evaluator-digits-v1" not in shown
        os.write(main, b"i")
        await asyncio.wait_for(until(b"evaluator-digits-v1"), 20)
        os.write(main, b"q")
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(main)


async def test_targets_by_address(mesh: Mesh, tmp_path: Path) -> None:
    targets = {
        each["labels"]["process"]: each["targets"][0]
        for each in json.loads((mesh.directory / TARGETS_FILE).read_text())
    }
    given = ("--target", targets["gate"], "--target", "127.0.0.1:1")
    status, out, err = await run(TOP, *given, "--once", "--interval", "0.2", tmp=tmp_path)
    assert status == 0
    assert "by 1 gate" in out
    assert err == "warning: 127.0.0.1:1 (127.0.0.1:1): Connection refused\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 1, "no mesh of `atserving up` runs on this machine"),
        (("--target", "nowhere"), 2, "'nowhere' is not host:port"),
        (("--target", "no.such.host.invalid:80"), 1, "the target no.such.host.invalid:80 has no address"),
        (("--target", "127.0.0.1:1", "--once", "--interval", "0.2"), 1, "no process answers"),
        (("--target", f"{'x' * 64}:80"), 1, ":80 has no address: no host can have this name"),
        (("--target", "127.0.0.1:99999"), 2, "is not host:port"),
        (("--interval", "nan", "--target", "127.0.0.1:1", "--once"), 2, "nan is no number"),
        (("--interval", "1e30", "--target", "127.0.0.1:1", "--once"), 2, "is not in the range"),
        (("--targets", "missing.json"), 1, "can't read missing.json: No such file or directory"),
        (("--targets", "setup.py", "--target", "a:1"), 2, "exclude each other"),
    ],
)
async def test_wrong_targets(arguments: Sequence[str], status: int, said: str, tmp_path: Path) -> None:
    ended = await run(TOP, *arguments, tmp=tmp_path)
    assert ended[0] == status
    assert said in ended[2]
    assert len(ended[2].splitlines()) <= 2


async def test_wrong_addresses_in_a_file_are_told(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    wrong = ["[::1", "..:80", "", "a\nb:80", "127.0.0.1:port"]
    file.write_text(json.dumps([{"targets": wrong, "labels": {"process": "\x1b[31mit"}}]))
    status, _, err = await run(TOP, "--targets", str(file), "--once", "--interval", "0.2", tmp=tmp_path)
    assert status == 1
    *warnings, failure = err.splitlines()
    assert len(warnings) == len(wrong)
    assert all(each.startswith("warning: \\x1b[31mit (") for each in warnings)
    assert failure.startswith("atserving: no process answers: \\x1b[31mit (")


async def test_of_several_meshes_one_must_be_chosen(mesh: Mesh, tmp_path: Path) -> None:
    tmp = only(tmp_path, mesh, mesh)
    status, _, err = await run(TOP, "--once", tmp=tmp)
    assert status == 1
    assert "several meshes run on this machine: choose one with --targets " in err
    chosen = str(tmp / f"{PREFIX}0" / TARGETS_FILE)
    assert (await run(TOP, "--once", "--interval", "0.2", "--targets", chosen, tmp=tmp))[0] == 0


async def test_the_lines_of_one_request(mesh: Mesh, client: Client, tmp_path: Path) -> None:
    reqid = 'logs-of-one"\\request'
    await client.bytes("/v1/eval/digits", image("7.png"), **{"x-reqid": "logs-of-another"})
    response = await client.bytes("/v1/eval/digits", image("7.png"), **{"x-reqid": reqid})
    assert response.status == 200
    tmp = only(tmp_path, mesh)
    found: list[dict[str, Any]] = []
    # Envoy writes its log a moment later.
    async with asyncio.timeout(20):
        while len(found) < 3:
            status, out, err = await run(LOGS, reqid, "-o", "json", tmp=tmp)
            found = [json.loads(line) for line in out.splitlines()]
    assert [each["service"] for each in found] == ["envoy", "evaluator", "gate"]
    assert {each["reqid"] for each in found} == {reqid}
    status, out, err = await run(LOGS, reqid, tmp=tmp)
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 3)
    assert "POST /v1/eval/digits" in lines[0]
    assert "request finished" in lines[1]
    assert "forward_ms=" in lines[1]


async def test_lines_from_elsewhere(tmp_path: Path) -> None:
    theirs = b'[pod/gate-1/gate] {"reqid":"r1","event":"late","service":"gate","timestamp":"2026-01-01T00:00:02Z"}\n'
    early = b'{"reqid":"r1","event":"early\\u001b[2J","service":"gate","timestamp":"2026-01-01T00:00:01.5Z"}\n'
    other = b'{"reqid":"r2","event":"other"}\nplain "r1" text\n{"r1": "r1"}\n'
    status, out, err = await run(LOGS, "r1", "-", tmp=tmp_path, stdin=theirs + other + early)
    assert (status, err) == (0, "")
    assert [line.split()[2] for line in out.splitlines()] == ["early\\x1b[2J", "late"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("r1",), "no mesh of `atserving up` runs"),
        (("r1", "-"), "- has no line of a request r1"),
        (("r1", "missing.log"), "can't read missing.log: No such file or directory"),
    ],
)
async def test_no_lines(arguments: Sequence[str], said: str, tmp_path: Path) -> None:
    status, out, err = await run(LOGS, *arguments, tmp=tmp_path)
    assert (status, out) == (1, "")
    assert said in err
