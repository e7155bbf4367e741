"""A front stays whole beside a hostile net.py, and leaves nothing of it behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from atserving.local import commands, proc
from atserving.local.examples import ROOT
from tests.evaluator.calling import ask, connected
from tests.evaluator.digits import digits_tar
from tests.evaluator.sandbox.attacks import Hostile, hostile, publish, request
from tests.processes import Process, Registry
from tests.waiting import until


async def status(process: Process) -> dict[str, Any]:
    port = process.logged("http_port")["http_port"]
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/status") as response:
        return dict(orjson.loads(await response.read()))


SUBREAPER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


async def test_front_that_is_the_first_process_is_left_with_no_dead_children(
    registry: Registry, tmp_path: Path
) -> None:
    publish(registry, "orphans", tmp_path)
    command = commands.evaluator(registry.address, "orphans", "v1")
    process = Process([sys.executable, "-c", SUBREAPER, *command])
    process.start()
    try:
        process.logged("address", app="orphans")
        code = """
        for _ in range(5):
            if not os.fork():
                if not os.fork(): time.sleep(1000)
                os._exit(0)
        os._exit(1)
        """
        async with connected(process) as connection:
            await ask(connection, request(code))
        assert await Hostile(process).run("found = 1") == {"found": 1}
        await until(lambda: [each.state for each in proc.every_process() if each.parent == process.pid].count("Z") == 0)
    finally:
        process.kill()


async def test_script_does_not_outlive_a_front_that_is_killed(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "outliving", tmp_path)
    with hostile(registry, "outliving") as one:
        code = """
        import fcntl
        # The worker's own way to end.
        os.killpg = lambda *_: time.sleep(1000)
        for name in os.listdir("/proc/self/fd"):
            for how in (os.O_RDONLY, os.O_WRONLY):
                try:
                    os.open(f"/proc/self/fd/{name}", how | os.O_NONBLOCK)
                    fcntl.fcntl(int(name), fcntl.F_SETFL, os.O_NONBLOCK)
                    fcntl.fcntl(int(name), fcntl.F_SETOWN, 0)
                except OSError:
                    pass
        found = os.fork()
        if not found:
            while True: time.sleep(1000)
        """
        child = (await one.run(code))["found"]
        os.kill(one.process.pid, signal.SIGKILL)
        await until(lambda: not [each for each in proc.every_process() if each.pid == child and each.is_alive])


@pytest.fixture
def workspaces() -> Iterator[Path]:
    """A folder whose removal takes no Python: pytest would fail to remove deep ones."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


async def test_folders_of_a_script_that_are_very_deep_are_removed(
    registry: Registry, tmp_path: Path, workspaces: Path
) -> None:
    publish(registry, "deep", tmp_path)
    with hostile(registry, "deep", "--workspace", str(workspaces)) as one:
        code = """
        for _ in range(1200):
            os.mkdir("x")
            os.chdir("x")
        os.chdir(os.environ["HOME"])
        """
        assert await one.run(code) == {"found": None}
        one.process.terminate()
        assert await asyncio.to_thread(one.process.wait) == 0
    assert os.listdir(workspaces) == []


# Run a command as root without any of its rights.
WITHOUT_ANY_RIGHTS = """
import os, sys
from evaluator.sandbox import enter, system

system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
none = enter._Capabilities((0, 0, 0), (0, 0, 0))
system.call(enter._CAPSET, enter._Header(enter._CAPABILITIES_VERSION, 0), none)
os.execv(sys.argv[1], sys.argv[1:])
"""


async def test_folders_of_a_script_that_nobody_may_read_are_removed(
    registry: Registry, tmp_path: Path, workspaces: Path
) -> None:
    publish(registry, "unreadable", tmp_path)
    command = commands.evaluator(registry.address, "unreadable", "v1", "--workspace", str(workspaces))
    process = Process([sys.executable, "-c", WITHOUT_ANY_RIGHTS, *command])
    process.start()
    try:
        code = """
        os.makedirs("x/y")
        os.mkdir("x/hidden", 0o300)
        os.mkdir("x/hidden/closed", 0)
        os.symlink("/", "x/hidden/root")
        Path("x/hidden/file").touch()
        """
        process.logged("address", app="unreadable")
        assert await Hostile(process).run(code) == {"found": None}
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
    finally:
        process.kill()
    assert os.listdir(workspaces) == []


async def test_script_that_prints_without_end_neither_floods_the_log_nor_stops_the_front(
    registry: Registry, tmp_path: Path
) -> None:
    publish(registry, "loud", tmp_path)
    with hostile(registry, "loud") as one:
        code = """
        os.truncate(2, 0) if os.path.isfile("/proc/self/fd/2") else None
        os.write(2, b"part of a line ")
        os.write(2, b"and its end\\n")
        until = time.monotonic() + 1
        while time.monotonic() < until:
            os.write(1, b"x" * 100 + b"\\n")
        """
        ran = asyncio.create_task(one.run(code))
        while not ran.done():
            # The front answers meanwhile.
            await status(one.process)
            await asyncio.sleep(0.05)
        assert await ran == {"found": None}
        text = one.process.log_text()
        assert "\npart of a line and its end\n" in text
        assert one.process.logged(event="service ready")
        # A script is held up once the pipe is full.
        assert len(text) < 20 << 20


# Run a command, or read another process, as root without its rights: in a container, for example.
WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
from evaluator.sandbox import enter, system

system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
enter._drop_capabilities()
if sys.argv[1].isdigit():
    Path(f"/proc/{sys.argv[1]}/environ").read_bytes()
else:
    os.execv(sys.argv[1], sys.argv[1:])
"""


def environment_of(process: Process) -> subprocess.CompletedProcess[str]:
    """Read the environment of a process as another one of its user does."""
    command = [sys.executable, "-c", WITHOUT_RIGHTS, str(process.pid)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("mode", "readable"), [("auto", False), ("off", True)])
def test_process_of_the_same_user_can_not_read_a_front(
    registry: Registry, tmp_path: Path, mode: str, readable: bool
) -> None:
    publish(registry, f"read-{mode}", tmp_path)
    front = commands.evaluator(registry.address, f"read-{mode}", "v1", f"--sandbox={mode}")
    process = Process([sys.executable, "-c", WITHOUT_RIGHTS, *front])
    process.start()
    try:
        process.logged("address", app=f"read-{mode}")
        read = environment_of(process)
        assert (read.returncode == 0, "PermissionError" in read.stderr) == (readable, not readable)
    finally:
        process.kill()


async def test_script_that_is_checked_can_not_read_the_check(tmp_path: Path) -> None:
    script = "import sys, time\ndef net_init(cfg):\n    print('loading', file=sys.stderr)\n    time.sleep(1000)\n"
    script += "def net_inference(model, args): ...\n"
    digits_tar(tmp_path / "release.tar", **{"net.py": script.encode()})
    check = [sys.executable, "-m", "evaluator", "check", str(tmp_path / "release.tar")]
    process = Process([sys.executable, "-c", WITHOUT_RIGHTS, *check])
    process.start()
    try:
        await until(lambda: "loading" in process.log_text())
        assert "PermissionError" in environment_of(process).stderr
    finally:
        process.kill()
