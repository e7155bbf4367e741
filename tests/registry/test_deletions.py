"""An emptied etcd takes no app down: registries and gates hold back deletions until an operator or the time decides."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest

from atserving.config import ACCEPT_KEY, PREFIX
from atserving.local import commands
from tests.processes import Etcd, Gate, Process, Registry, evaluator
from tests.waiting import until, until_async

pytestmark = pytest.mark.slow

Start = Callable[[Process], Process]
APPS = ["one", "two", "three"]
OPEN, UNKNOWN = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND
"""The apps have no instance, but for one test."""


@dataclass
class Mesh:
    etcd: Etcd
    registry: Registry
    gate: Gate

    def release(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(commands.BIN / "atserving"), "release", *arguments, "--registry", self.registry.address]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    async def until(self, status: grpc.StatusCode, gate: Gate | None = None) -> None:
        """Wait until all apps answer so."""

        async def answer() -> bool:
            return {await (gate or self.gate).status(app) for app in APPS} == {status}

        await until_async(answer, what=f"all apps answer {status}")

    def publish(self) -> None:
        for app in APPS:
            self.registry.publish(app, phase="production")

    def empty(self) -> None:
        self.registry.etcdctl("del", "--prefix", PREFIX)


async def knows(gate: Gate, app: str, *, knows_it: bool = True) -> bool:
    return (await gate.status(app) is not UNKNOWN) == knows_it


@pytest.fixture
def start(etcd: Etcd, tmp_path: Path, processes: Start) -> Callable[..., Mesh]:
    """Return a function that starts a registry and a gate with flags."""

    def start(*flags: str) -> Mesh:
        registry = Registry(tmp_path, [etcd.address], "--lease-ttl", "2s", *flags)
        gate = Gate([registry.address], *flags)
        processes(registry)
        registry.wait_serving()
        processes(gate)
        mesh = Mesh(etcd, registry, gate)
        mesh.publish()
        return mesh

    return start


async def test_apps_are_served_while_etcd_is_empty_and_after_it_is_restored(start: Callable[..., Mesh]) -> None:
    mesh = start()
    with ExitStack() as stack:
        for app in APPS:
            stack.enter_context(evaluator(mesh.registry, app))
        await mesh.until(grpc.StatusCode.OK)
        mesh.empty()
        assert mesh.registry.logged("left_s", event="deletions held", releases=3)["level"] == "error"
        assert {line.split(": ")[1] for line in mesh.release("list").stderr.splitlines()} >= {
            f"{PREFIX}eval/{app}/v1" for app in APPS
        }
        await mesh.until(grpc.StatusCode.OK)

        # A registry that starts now knows of nothing, but the gate does.
        mesh.registry.kill()
        mesh.registry.start()
        mesh.registry.wait_serving()
        assert mesh.gate.logged("left_s", event="deletions held", releases=3)
        await mesh.until(grpc.StatusCode.OK)

        mesh.publish()
        mesh.gate.logged("reason", event="deletions no longer held")
        await until(lambda: all(len(mesh.registry.instances(app)) == 1 for app in APPS), what="the instances are back")
        await mesh.until(grpc.StatusCode.OK)
        assert not mesh.release("list").stderr


async def test_a_wiped_etcd_takes_no_app_down(start: Callable[..., Mesh]) -> None:
    mesh = start()
    await mesh.until(OPEN)
    mesh.etcd.kill()
    mesh.etcd.wipe()
    mesh.etcd.start()
    await mesh.etcd.ready()
    mesh.registry.logged("left_s", event="deletions held", releases=3)
    await mesh.until(OPEN)


async def test_a_registry_that_restarts_on_a_half_restored_etcd_drops_no_other_half(start: Callable[..., Mesh]) -> None:
    mesh = start()
    mesh.registry.publish("four")
    await until_async(partial(knows, mesh.gate, "four"), what="the gate knows all apps")
    mesh.empty()
    mesh.registry.logged("left_s", event="deletions held", releases=4)
    for app in APPS[:2]:
        mesh.registry.publish(app, phase="production")
    mesh.registry.kill()
    mesh.registry.start()
    mesh.registry.wait_serving()
    mesh.gate.logged("left_s", event="deletions held", releases=2)
    await mesh.until(OPEN)


async def test_a_wiped_etcd_does_not_take_an_only_app_down(start: Callable[..., Mesh]) -> None:
    mesh = start()
    await mesh.until(OPEN)
    mesh.registry.etcdctl("put", ACCEPT_KEY, "{}")
    for app in APPS[1:]:
        mesh.registry.delete(f"eval/{app}/v1")
        await until_async(partial(knows, mesh.gate, app, knows_it=False), what=f"{app} is gone")
    mesh.registry.etcdctl("del", ACCEPT_KEY)
    mesh.etcd.kill()
    mesh.etcd.wipe()
    mesh.etcd.start()
    await mesh.etcd.ready()
    mesh.registry.logged("left_s", event="deletions held", releases=1)
    assert await knows(mesh.gate, APPS[0])
    # A registry that starts now knows of nothing.
    mesh.registry.kill()
    mesh.registry.start()
    mesh.registry.wait_serving()
    mesh.gate.logged("left_s", event="deletions held", releases=1)
    assert await knows(mesh.gate, APPS[0])


async def test_an_operator_accepts_the_deletions(start: Callable[..., Mesh]) -> None:
    mesh = start()
    await mesh.until(OPEN)
    mesh.empty()
    mesh.registry.logged("left_s", event="deletions held", releases=3)
    await mesh.until(OPEN)
    assert mesh.release("accept-deletions").stdout == "deletions are taken at once for 60 s\n"
    await mesh.until(UNKNOWN)
    mesh.publish()
    await mesh.until(OPEN)
    mesh.empty()
    mesh.registry.etcdctl("put", ACCEPT_KEY, "{}")
    await mesh.until(UNKNOWN)


async def test_a_gate_takes_the_operators_word_from_a_new_registry(start: Callable[..., Mesh]) -> None:
    mesh = start()
    await mesh.until(OPEN)
    mesh.empty()
    mesh.registry.logged("left_s", event="deletions held", releases=3)
    mesh.registry.kill()
    mesh.registry.start()
    mesh.registry.wait_serving()
    mesh.gate.logged("left_s", event="deletions held", releases=3)
    await mesh.until(OPEN)
    mesh.release("accept-deletions")
    await mesh.until(UNKNOWN)


@pytest.mark.parametrize("seconds", ["0", "1"])
async def test_deletions_are_taken_after_the_time_of_the_flag(start: Callable[..., Mesh], seconds: str) -> None:
    mesh = start("--hold-deletions", seconds)
    await mesh.until(OPEN)
    mesh.empty()
    await mesh.until(UNKNOWN)
    held = any('"deletions held"' in line for line in mesh.registry.lines)
    assert held == (seconds != "0")
