"""``atserving doctor`` on a mesh of real processes: what it finds when all is well, and when something is not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from atserving import __version__
from atserving.local import commands, examples
from atserving.local.mesh import Mesh
from tests.processes import etcdctl
from tests.waiting import until_async

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh() -> AsyncIterator[Mesh]:
    async with Mesh(serves=examples.DIGITS) as mesh:
        yield mesh


async def doctor(mesh: Mesh, *flags: str) -> tuple[int, list[dict[str, str]]]:
    """Return the exit status and the findings."""
    command = [str(commands.BIN / "atserving"), "doctor", "--server", mesh.registry, "--edge", mesh.url, "-o", "json"]
    run = await asyncio.to_thread(subprocess.run, [*command, *flags], capture_output=True, text=True, check=False)
    return run.returncode, json.loads(run.stdout)["findings"]


def said(findings: list[dict[str, str]], state: str) -> dict[str, str]:
    return {each["what"]: each["said"] for each in findings if each["state"] == state}


async def test_a_healthy_mesh(mesh: Mesh) -> None:
    async def healthy() -> bool:
        return (await doctor(mesh))[0] == 0

    await until_async(healthy)
    _, findings = await doctor(mesh)
    assert {each["state"] for each in findings} == {"ok"}
    fine = said(findings, "ok")
    assert fine[f"registry {mesh.registry}"].startswith(f"version {__version__}, config of revision ")
    assert fine[f"edge {mesh.url}"] == "/health is 200"
    assert (fine["apps"], fine["instances"]) == ("1 looked at", "2 looked at")


async def test_a_version_in_staging_that_has_scaled_to_zero_is_no_fault(mesh: Mesh) -> None:
    hold = '{"wait_for_instance": "60s", "timeout": "90s"}'
    etcdctl(mesh.etcd, "put", "/ava/serving/worker/app/digits/release/v9", hold)
    etcdctl(mesh.etcd, "put", "/ava/serving/eval/digits/v9", '{"file": "file:///x"}')

    async def listed() -> bool:
        command = [str(commands.BIN / "atserving"), "release", "list", "--server", mesh.registry]
        run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        rows = [line.split() for line in run.stdout.splitlines()]
        return ["digits", "v9", "staging", "-", "0"] in [row[:5] for row in rows]

    try:
        await until_async(listed)
        status, findings = await doctor(mesh)
        assert (status, {each["state"] for each in findings}) == (0, {"ok"})
    finally:
        for key in ("eval/digits/v9", "worker/app/digits/release/v9"):
            etcdctl(mesh.etcd, "del", f"/ava/serving/{key}")


async def test_what_is_wrong_is_said_with_what_to_do(mesh: Mesh) -> None:
    etcdctl(mesh.etcd, "put", "/ava/serving/worker/app/digits/default", "{")
    etcdctl(mesh.etcd, "put", "/ava/serving/worker/app/none/default", "{}")
    etcdctl(mesh.etcd, "put", "/ava/serving/eval/idle/v1", '{"file": "file:///x", "phase": "production"}')
    etcdctl(mesh.etcd, "put", "/ava/serving/eval/idle/v2", '{"file": "file:///x"}')
    # One that has an instance, and gets no requests.
    etcdctl(mesh.etcd, "put", "/ava/serving/eval/idle/v3", '{"file": "file:///x", "phase": "production", "weight": 0}')
    etcdctl(mesh.etcd, "put", "/ava/serving/app/routing/idle", '{"shadow": {"version": "v2", "percent": 1}}')
    instance = {"app": "digits", "version": "v1", "id": "gone", "address": "127.0.0.1:1", "capacity": 4}
    etcdctl(mesh.etcd, "put", "/ava/serving/instance/digits/v1/gone", json.dumps(instance))
    idle_one = {**instance, "app": "idle", "version": "v3"}
    etcdctl(mesh.etcd, "put", "/ava/serving/instance/idle/v3/gone", json.dumps(idle_one))

    async def seen() -> bool:
        return "instance digits v1 gone" in said((await doctor(mesh))[1], "warning")

    try:
        await until_async(seen)
        status, findings = await doctor(mesh)
        assert status == 1
        failed, warned = said(findings, "failed"), said(findings, "warning")
        assert failed["/ava/serving/worker/app/digits/default"].startswith("not JSON")
        assert failed["app idle"] == "no version in production with a weight above 0 has a ready instance"
        assert warned["/ava/serving/worker/app/none/default"] == "the app has no release"
        assert warned["app idle"] == "its shadow v2 has no ready instance, so copies are dropped"
        assert warned["instance digits v1 gone"] == "127.0.0.1:1: does not answer"
        assert all(each["do"] for each in findings if each["state"] != "ok")
    finally:
        idle = ("eval/idle/v1", "eval/idle/v2", "eval/idle/v3", "app/routing/idle", "instance/idle/v3/gone")
        for key in ("worker/app/digits/default", "worker/app/none/default", *idle, "instance/digits/v1/gone"):
            etcdctl(mesh.etcd, "del", f"/ava/serving/{key}")


async def test_what_can_not_be_reached(mesh: Mesh) -> None:
    status, findings = await doctor(mesh, "--server", f"127.0.0.1:1,{mesh.registry}", "--edge", "http://127.0.0.1:1")
    assert status == 1
    failed = said(findings, "failed")
    assert failed["registry 127.0.0.1:1"].startswith("there is no connection to it in plain text")
    assert "refused" in failed["edge http://127.0.0.1:1"]
    # Another server than an Envoy, and no URL.
    for edge, what in ((f"http://{mesh.registry}", "no answer: "), ("file:///etc/passwd", "no URL of HTTP")):
        assert said((await doctor(mesh, "--edge", edge))[1], "failed")[f"edge {edge}"].startswith(what)
    assert f"registry {mesh.registry}" in said(findings, "ok")
    status, findings = await doctor(mesh, "--server", "127.0.0.1:1")
    assert (status, "config" in said(findings, "failed")) == (1, True)


async def test_an_instance_of_other_content_and_a_frozen_etcd(mesh: Mesh) -> None:
    release = json.loads(etcdctl(mesh.etcd, "get", "--print-value-only", "/ava/serving/eval/digits/v2"))
    other = json.dumps({**release, "desc": "other content", "batch_size": 3})
    etcdctl(mesh.etcd, "put", "/ava/serving/eval/digits/v2", other)

    async def found(state: str, words: str) -> bool:
        return any(words in each for each in said((await doctor(mesh))[1], state).values())

    try:
        await until_async(lambda: found("warning", "has loaded other content than its release has"))
    finally:
        etcdctl(mesh.etcd, "put", "/ava/serving/eval/digits/v2", json.dumps(release))
    os.kill(mesh.pids()["etcd"], signal.SIGSTOP)
    try:
        await until_async(lambda: found("failed", "has lost etcd: "))
        status, findings = await doctor(mesh)
        assert status == 1
        assert said(findings, "ok")["apps"].endswith(" looked at")
    finally:
        os.kill(mesh.pids()["etcd"], signal.SIGCONT)
    await until_async(lambda: found("ok", "config of revision"))
