"""Processes that are killed, stopped and frozen."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

from reliability.callers import EVERY_KIND
from reliability.mesh import Mesh
from reliability.parts import Part
from reliability.scenario import Scenario, Stage

_Find = Callable[[Mesh], Awaitable[Part]]


def _named(name: str) -> _Find:
    async def find(mesh: Mesh) -> Part:
        return mesh.parts[name]

    return find


_EVALUATOR = "digits-v1-0"
_PARTS: dict[str, _Find] = {
    "gate": _named("gate-0"),
    "evaluator": _named(_EVALUATOR),
    "registry": _named("registry-0"),
    "etcd leader": Mesh.leader,
}
_ENVOY = _named("envoy-0")


def _killed(find: _Find) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        part = await find(stage.mesh)
        stage.broken.add(part.name)
        part.kill()

    return act


async def _worker_killed(stage: Stage) -> None:
    stage.broken.add(_EVALUATOR)
    stage.mesh.parts[_EVALUATOR].signal_worker(signal.SIGKILL)


def _stopped(find: _Find) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        part = await find(stage.mesh)
        stage.broken.add(part.name)
        await part.stop()
        part.start()

    return act


def _frozen(find: _Find, seconds: float) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        part = await find(stage.mesh)
        part.freeze()
        try:
            await stage.sleep(seconds)
        finally:
            part.thaw()

    return act


def _worker_frozen(seconds: float) -> Callable[[Stage], Awaitable[None]]:
    async def act(stage: Stage) -> None:
        # The front may kill a worker that hangs; this is its way out.
        stage.broken.add(_EVALUATOR)
        part = stage.mesh.parts[_EVALUATOR]
        part.signal_worker(signal.SIGSTOP)
        try:
            await stage.sleep(seconds)
        finally:
            part.signal_worker(signal.SIGCONT)

    return act


async def _nothing(_: Stage) -> None:
    pass


def process_faults() -> list[Scenario]:
    """Return the scenarios, the one without a fault first."""
    found = [Scenario("no fault", _nothing, EVERY_KIND, 8)]
    found += [Scenario(f"{name} killed", _killed(find), EVERY_KIND, agrees=True) for name, find in _PARTS.items()]
    found.append(Scenario("worker killed", _worker_killed, EVERY_KIND))
    found.append(Scenario("Envoy killed", _killed(_ENVOY), EVERY_KIND, broken_edge=0))
    found += [Scenario(f"{name} stopped", _stopped(find), EVERY_KIND, agrees=True) for name, find in _PARTS.items()]
    for seconds in (5, 40):
        whole_s = seconds + 5
        found += [
            Scenario(f"{name} frozen {seconds} s", _frozen(find, seconds), EVERY_KIND, whole_s, agrees=True)
            for name, find in _PARTS.items()
        ]
        found.append(Scenario(f"worker frozen {seconds} s", _worker_frozen(seconds), EVERY_KIND, whole_s))
        found.append(
            Scenario(f"Envoy frozen {seconds} s", _frozen(_ENVOY, seconds), EVERY_KIND, whole_s, broken_edge=0)
        )
    return found
