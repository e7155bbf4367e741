"""The local mesh reports why it does not start, and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

import pytest

from atserving.errors import StartError
from atserving.local import examples, proc
from atserving.local.child import bound_to_parent
from atserving.local.mesh import Mesh
from tests.waiting import until

DIGITS_V1 = examples.DIGITS[:1]
HOLDER = """
import asyncio
from atserving.local import examples
from atserving.local.mesh import Mesh

async def main():
    async with Mesh(serves=examples.DIGITS[:1]):
        print("ready", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_no_process_outlives_a_mesh_that_is_killed(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(
        *bound_to_parent([sys.executable, "-c", HOLDER]),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert holder.stdout
    assert await holder.stdout.readline() == b"ready\n"
    pids = [each.pid for each in proc.descendants(holder.pid)]
    assert len(pids) == len(["etcd", "registry", "gate", "envoy", "files", "evaluator", "its worker"])
    holder.kill()
    await holder.wait()
    await until(lambda: not any(map(proc.is_alive, pids)), "every process of the mesh has ended")


async def test_a_mesh_that_does_not_start_reports_the_last_log_line_of_a_process_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Without the pictures, no release can answer.
    mesh = Mesh(serves=DIGITS_V1, start_timeout_s=5, extra={"files": ["--no-such-flag"]})
    with pytest.raises(
        StartError, match=r"not ready within 5 s: .*files: server.py: error: .* --no-such-flag"
    ) as failed:
        await mesh.__aenter__()
    assert f"(logs: {mesh.directory}/*.log)" in str(failed.value)
    assert "--no-such-flag" in (mesh.directory / "files.log").read_text()
    assert not mesh.pids()


async def test_a_port_in_use_is_reported_before_anything_starts() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(StartError, match=f"port {port} is in use: choose another with --port or PORT="):
        await Mesh(port).__aenter__()
    server.close()
