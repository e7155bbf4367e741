"""Faults of what instances and releases are registered."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import aiohttp

from atserving.local.ports import free_ports
from atserving.local.publishing import publish
from reliability import releases
from reliability.callers import EVERY_KIND
from reliability.releases import PICTURES
from reliability.scenario import Scenario, Stage
from reliability.truth import versions_that_say

_POLL_S = 0.1
_PATIENCE_S = 60.0
_DIGIT = 3
_QUICK, _V1 = releases.quick(0), releases.digits("v1", 0)


async def _port_reused(stage: Stage) -> None:
    """Kill an instance, and start one of another app on its port at once."""
    (port,) = free_ports(1)
    listen = ["--listen", f"127.0.0.1:{port}"]
    try:
        stage.mesh.start_evaluator(_V1, "first", *listen)
        await stage.mesh.until_listed(_V1, 1)
        await stage.sleep(3)
        await stage.mesh.end("first")
        second = stage.mesh.start_evaluator(_QUICK, "second", *listen)
        await stage.mesh.until_listed(_QUICK, 1)
        await stage.sleep(3)
        await second.stop()
    finally:
        await stage.mesh.end("first")
        await stage.mesh.end("second")


async def _republished(stage: Stage) -> None:
    """Delete a version and publish it with other content, while an instance of the old content runs."""
    mesh = stage.mesh
    old = replace(_V1, app="turn")
    new = replace(releases.digits("v2", 0), app="turn", version="v1")
    key = "eval/turn/v1"
    asker = _Asker(stage)
    try:
        await publish(mesh.registries[0], old.release())
        mesh.start_evaluator(old, "turn-old")
        await asker.until("v1")
        await mesh.delete(key)
        await publish(mesh.registries[0], new.release())
        asker.begin()
        await asker.ask_for(stage.scale * 3)
        mesh.start_evaluator(new, "turn-new")
        await asker.until("v2")
        await asker.ask_for(stage.scale * 2)
        stage.note(asker.summary())
    finally:
        await mesh.end("turn-old")
        await mesh.end("turn-new")
        await mesh.delete(key)


class _Asker:
    """Asks for the app ``turn`` again and again, and counts whose content answered."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._said: Counter[str] = Counter()
        self._began_s = self._last_old_s = time.monotonic()

    def begin(self) -> None:
        """Count from now on."""
        self._said.clear()
        self._began_s = self._last_old_s = time.monotonic()

    async def until(self, version: str) -> None:
        """Ask until the content of a version of ``digits`` answers."""
        async with asyncio.timeout(_PATIENCE_S):
            await self._ask(lambda said: said == version)

    async def ask_for(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        await self._ask(lambda _: time.monotonic() > until_s)

    def summary(self) -> str:
        said = ", ".join(f"{count} x {what}" for what, count in self._said.most_common())
        text = f"after the second publication: {said}"
        return f"{text}; v1 for {self._last_old_s - self._began_s:.1f} s" if self._said["v1"] else text

    async def _ask(self, enough: Callable[[str], bool]) -> None:
        url = f"{self._stage.mesh.edges[0]}/v1/eval/turn/v1"
        headers = {"content-type": "application/octet-stream"}
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.post(url, data=PICTURES[_DIGIT], headers=headers) as response:
                    body = await response.read()
                said = str(response.status)
                if response.status == 200:
                    said = "".join(versions_that_say(self._stage.truth, "digits", _DIGIT, json.loads(body)["result"]))
                self._said[said] += 1
                if said == "v1":
                    self._last_old_s = time.monotonic()
                if enough(said):
                    return
                await asyncio.sleep(_POLL_S)


async def _no_registry(stage: Stage) -> None:
    """Start a gate and an evaluator, each with its cached config, while no registry answers."""
    registries = stage.mesh.of_kind("registry")
    started = [stage.mesh.parts[name] for name in ("gate-0", "digits-v1-0")]
    stage.broken |= {part.name for part in [*registries, *started]}
    await asyncio.gather(*(part.end() for part in registries))
    try:
        for part in started:
            part.kill()
        await stage.sleep(8)
    finally:
        for part in registries:
            part.start()


def config_faults() -> list[Scenario]:
    """Return the scenarios."""
    return [
        Scenario("port of a killed instance reused", _port_reused, EVERY_KIND, 14),
        Scenario("version published again with other content", _republished, EVERY_KIND, 12),
        Scenario("gate and evaluator started without a registry", _no_registry, EVERY_KIND, 14),
    ]
