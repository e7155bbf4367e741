"""What the operator allows a net.py, and what is said of the sandbox on a host that lacks a part of it."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from atserving.local import commands
from tests.evaluator.calling import ask, connected
from tests.evaluator.sandbox.attacks import hostile, publish, request
from tests.processes import Process, Registry, evaluator, start_evaluator

ALL = ["environment", "limits", "files", "processes", "signals", "session"]
FORBIDDEN = "evaluator: the release has a net.py, and the worker config of {} forbids scripts"

# Runs a command on a kernel that has no Landlock, as far as the command can tell.
WITHOUT_LANDLOCK = """
import os, struct, sys
from ctypes import CDLL, byref, c_char_p, c_ulong, c_ushort, Structure

class Program(Structure):
    _fields_ = [("length", c_ushort), ("instructions", c_char_p)]

steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("<HBBI", *step) for step in steps)
libc = CDLL(None)
assert not libc.prctl(38, c_ulong(1), c_ulong(0), c_ulong(0), c_ulong(0))
assert not libc.prctl(22, c_ulong(2), byref(Program(len(steps), program)), c_ulong(0), c_ulong(0))
os.execv(sys.argv[1], sys.argv[1:])
"""


async def status(process: Process) -> dict[str, Any]:
    port = process.logged("http_port")["http_port"]
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/status") as response:
        return dict(orjson.loads(await response.read()))


def refused_start(registry: Registry, app: str, *flags: str) -> str:
    """Return the last line of an evaluator that does not start."""
    process = start_evaluator(registry.address, app, "v1", *flags)
    try:
        assert process.wait() == 1
        return process.lines[-1]
    finally:
        process.kill()


async def test_status_and_log_say_what_holds(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "said", tmp_path)
    with hostile(registry, "said") as one:
        expected = {"mode": "auto", "network": False, "holds": [*ALL, "network"], "missing": []}
        assert (await status(one.process))["sandbox"] == expected
        logged = one.process.logged(event="sandbox ready")
        assert {name: logged[name] for name in ("level", "mode", "network", "holds")} == {
            **{name: expected[name] for name in ("mode", "network", "holds")},
            "level": "info",
        }


async def test_built_in_net_is_confined_and_serves_where_scripts_are_forbidden(registry: Registry) -> None:
    registry.publish("built-in")
    with evaluator(registry, "built-in", "v1", "--scripts=forbid", "--sandbox=require") as process:
        assert (await status(process))["sandbox"]["holds"] == [*ALL, "network"]


async def test_script_gets_the_network_if_it_asks_and_the_operator_allows_it(
    registry: Registry, tmp_path: Path
) -> None:
    publish(registry, "networked", tmp_path, model_params={"network": True})
    with hostile(registry, "networked", "--allow-script-network", "--sandbox=require") as one:
        host, _, port = registry.address.partition(":")
        code = f"found = socket.create_connection(({host!r}, {port})).getpeername()[1]"
        assert await one.run(code) == {"found": int(port)}
        assert await one.run("found = socket.getaddrinfo('localhost', 80)[0][4][1]") == {"found": 80}
        for family in ("AF_UNIX", "AF_VSOCK", "AF_PACKET", "AF_NETLINK, socket.SOCK_RAW, 4"):
            assert await one.run(f"socket.socket(socket.{family})") == {"refused": errno.EACCES}
        assert await one.run("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)") == {"found": None}
        assert (await status(one.process))["sandbox"]["network"] is True


async def test_script_that_does_not_ask_has_no_network_though_it_is_allowed(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "modest", tmp_path)
    with hostile(registry, "modest", "--allow-script-network") as one:
        assert await one.run("socket.socket()") == {"refused": errno.EACCES}


def test_script_that_asks_for_a_network_that_is_not_allowed_does_not_start(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "unallowed", tmp_path, model_params={"network": True})
    assert refused_start(registry, "unallowed") == (
        "evaluator: model_params.network is true, but this evaluator does not allow it: --allow-script-network"
    )


def test_evaluator_may_forbid_scripts(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "flagged", tmp_path)
    assert refused_start(registry, "flagged", "--scripts=forbid") == (
        "evaluator: the release has a net.py, and --scripts is forbid"
    )


def test_worker_config_may_forbid_scripts_of_an_app(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "forbidden", tmp_path)
    registry.put("worker/app/forbidden/default", {"scripts": "forbid"})
    assert refused_start(registry, "forbidden") == FORBIDDEN.format("forbidden")


async def test_worker_config_that_forbids_scripts_ends_those_that_run(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "running", tmp_path)
    file = tmp_path / "status.json"
    with hostile(registry, "running", "--status-file", str(file)) as one:
        registry.put("worker/app/running/release/v1", {"max_concurrent": 3})
        assert await one.run("found = 1") == {"found": 1}
        registry.put("worker/app/running/default", {"scripts": "forbid"})
        assert await asyncio.to_thread(one.process.wait) == 1
        assert one.process.lines[-1] == FORBIDDEN.format("running")
        assert one.process.logged(event="service draining")
    assert orjson.loads(file.read_bytes())["state"] == "failed"
    assert not registry.instances("running")


@pytest.mark.parametrize("name", ["keys", "kernel", "elsewhere"])
def test_script_gets_no_local_file_that_is_not_for_releases(registry: Registry, tmp_path: Path, name: str) -> None:
    keys, releases = tmp_path / "keys.json", tmp_path / "releases"
    keys.write_text('{"access_key": "access", "secret_key": "secret"}')
    releases.mkdir()
    (releases / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other").touch()
    uris = {"keys": keys.as_uri(), "kernel": "file:///proc/self/environ", "elsewhere": (releases / "link").as_uri()}
    publish(registry, f"local-{name}", releases, custom_files={"x": uris[name]})
    said = refused_start(registry, f"local-{name}", "--qiniu", str(keys), "--local-files", str(releases))
    reason = "is in no folder of --local-files" if name == "elsewhere" else "is no file for releases"
    assert said == f"evaluator: custom_files.x {uris[name]}: {reason}"


async def test_script_gets_no_other_file_by_a_link_that_it_turns_later(registry: Registry, tmp_path: Path) -> None:
    keys, harmless, link = tmp_path / "keys.json", tmp_path / "harmless", tmp_path / "link"
    keys.write_text('{"access_key": "access", "secret_key": "secret"}')
    harmless.write_text("harmless")
    link.symlink_to(harmless)
    publish(registry, "turned", tmp_path, custom_files={"x": link.as_uri()})
    with hostile(registry, "turned", "--qiniu", str(keys)) as one:
        link.unlink()
        link.symlink_to(keys)
        async with connected(one.process) as connection:
            await ask(connection, request("os._exit(1)"))
        assert await one.run("found = Path(cfg['custom_files']['x']).read_text()") == {"found": "harmless"}


async def test_release_names_no_file_that_a_script_has_written(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "planting", tmp_path)
    with hostile(registry, "planting") as one:
        planted = (await one.run("Path('planted').write_text(''); found = os.path.abspath('planted')"))["found"]
        uri = Path(planted).as_uri()
        publish(registry, "planted", tmp_path, custom_files={"x": uri})
        assert (
            refused_start(registry, "planted")
            == f"evaluator: custom_files.x {uri}: is in the workspace of an evaluator"
        )


MOST_TASKS = 64 + 4 * (os.cpu_count() or 1)
LOADS: dict[str, tuple[str, str]] = {
    "bomb": (
        "    for _ in range(3000):\n        if not os.fork(): time.sleep(1000)\n    time.sleep(1000)",
        "evaluator: the net's process ended while the net was loaded: "
        f"it has more than {MOST_TASKS} processes and threads",
    ),
    "hog": (
        "    return {'held': [mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE) for _ in range(4096)]}",
        "evaluator: net_init raised OSError, see the log",
    ),
    "connecting": ("    socket.create_connection(('127.0.0.1', 9))", "evaluator: net_init raised PermissionError"),
}


@pytest.mark.parametrize("name", LOADS)
def test_script_is_confined_while_it_loads(registry: Registry, tmp_path: Path, name: str) -> None:
    body, message = LOADS[name]
    script = f"import mmap, os, socket, time\ndef net_init(cfg):\n{body}\ndef net_inference(model, args): ...\n"
    publish(registry, f"loading-{name}", tmp_path, script.encode())
    assert refused_start(registry, f"loading-{name}", f"--script-processes={MOST_TASKS}").startswith(message)


class TestHostWithoutLandlock:
    """A host whose kernel lacks a part of the sandbox."""

    @staticmethod
    def started(registry: Registry, app: str, *flags: str) -> Process:
        command = commands.evaluator(registry.address, app, "v1", *flags)
        process = Process([sys.executable, "-c", WITHOUT_LANDLOCK, *command])
        process.start()
        return process

    async def test_auto_does_what_is_left_and_says_so(self, registry: Registry, tmp_path: Path) -> None:
        publish(registry, "partly", tmp_path)
        process = self.started(registry, "partly")
        try:
            said = process.logged(event="sandbox incomplete")
            assert said["level"] == "warning"
            assert said["holds"] == ["environment", "limits", "session", "network"]
            assert said["reason"].startswith("files: Landlock is missing, it takes version 3, Linux 6.2; processes: ")
            process.logged(event="service ready")
            assert (await status(process))["sandbox"]["missing"] == said["reason"].split("; ")
        finally:
            process.kill()

    def test_required_sandbox_refuses_a_script(self, registry: Registry, tmp_path: Path) -> None:
        publish(registry, "unconfined", tmp_path)
        process = self.started(registry, "unconfined", "--sandbox=require")
        try:
            assert process.wait() == 1
            start = "evaluator: --sandbox is require, but this host can't confine a net.py fully: files: Landlock is"
            assert process.lines[-1].startswith(start)
        finally:
            process.kill()


async def test_sandbox_may_be_off(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "off", tmp_path)
    with hostile(registry, "off", "--sandbox=off", MY_VARIABLE="here") as one:
        assert await one.run("socket.socket(); found = os.environ['MY_VARIABLE']") == {"found": "here"}
        assert one.process.logged(event="sandbox incomplete")["reason"] == "--sandbox is off"
