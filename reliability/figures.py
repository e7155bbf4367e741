"""Measure by hand what no scenario shows: how fast a gate stops and a worker returns, and what a refusal costs.

python -m reliability.figures
"""

from __future__ import annotations

import asyncio
import re
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from atserving.config import PREFIX, instance_key
from atserving.local.foreground import run_until_stopped
from atserving.local.publishing import publish
from bench.machine import Moment, usage
from bench.measurement import markdown_table
from registry.etcd import Connection, EtcdClient
from reliability import before, releases
from reliability.mesh import Mesh
from reliability.releases import PICTURES, Served

_DEAD = 300
# So many requests reach both gates.
_BOTH_GATES = 10
_DEAD_APP = "dead"
# Instances whose net stands still hand back what waits after a second, until all of them do.
_PLACES, _SETTLE_S = 128, 4.0
_ASKERS, _ASK_S = 32, 3.0
_KILLS = 5
_PATIENCE_S = 60.0
_OCTETS = {"content-type": "application/octet-stream"}
_JSON = {"content-type": "application/json"}
_SLEEP = orjson.dumps({"data": {"uri": "data:a;base64,AA=="}, "params": {"do": "sleep", "s": 20}})


def serves(folder: Path) -> Sequence[Served]:
    """Return the releases: a fast app with one instance, and the drill's net with two."""
    return [releases.quick(1), releases.drill(folder, 2)]


async def _worker_returns(mesh: Mesh, session: aiohttp.ClientSession) -> tuple[str, str]:
    """Kill the worker of an app's only instance, and ask the app at once. The request waits for the next worker."""
    took_s = []
    for _ in range(_KILLS):
        mesh.parts["quick-v1-0"].signal_worker(signal.SIGKILL)
        began_s = time.monotonic()
        async with session.post(f"{mesh.edges[0]}/v1/eval/quick", data=PICTURES[1], headers=_OCTETS) as response:
            response.raise_for_status()
        took_s.append(time.monotonic() - began_s)
    now = f"{statistics.median(took_s):.2f} s to the next answer, median of {_KILLS}"
    return "the worker of an only instance dies", now


async def _refusals(mesh: Mesh, session: aiohttp.ClientSession) -> list[tuple[str, str]]:
    """Fill both instances of an app, and ask for more with 32 callers; then ask for an app that is not there."""
    filling: list[asyncio.Task[int]] = []
    try:
        while free := _PLACES - await _metric(mesh, session, "requests_in_flight"):
            filling += [asyncio.create_task(_status(mesh, session, "drill")) for _ in range(int(free))]
            await asyncio.sleep(_SETTLE_S)
        earlier = await _metric(mesh, session, "requests_total", code="429")
        answers, cost = await _asked(mesh, session, "drill", 429)
        refusals = await _metric(mesh, session, "requests_total", code="429") - earlier
    finally:
        for task in filling:
            task.cancel()
        await asyncio.wait(filling)
    _, cost_of_404 = await _asked(mesh, session, "nothing", 404)
    return [
        ("refusals by instances for each 429", f"{refusals / answers:.2f}: {refusals:,.0f} for {answers:,}"),
        ("CPU time of a 429", cost),
        ("CPU time of a 404 for an unknown app", cost_of_404),
    ]


async def _asked(mesh: Mesh, session: aiohttp.ClientSession, app: str, status: int) -> tuple[int, str]:
    """Ask an app for some seconds; return the number of answers, and the CPU time of each by kind of process."""
    groups = {kind: [part.pid for part in mesh.of_kind(kind) if part.pid] for kind in ("gate", "front", "envoy")}
    until_s = time.monotonic() + _ASK_S
    answers = 0

    async def ask() -> None:
        nonlocal answers
        while time.monotonic() < until_s:
            said = await _status(mesh, session, app)
            if said != status:
                raise OSError(f"the app {app!r} answers {said}, not {status}")
            answers += 1

    earlier = usage(groups)
    await asyncio.gather(*(ask() for _ in range(_ASKERS)))
    used = {kind: each.since(earlier[kind]).cpu_s for kind, each in usage(groups).items()}
    return answers, ", ".join(f"{kind} {cpu_s / answers * 1e6:.0f} us" for kind, cpu_s in used.items())


async def _status(mesh: Mesh, session: aiohttp.ClientSession, app: str) -> int:
    async with session.post(f"{mesh.edges[0]}/v1/eval/{app}", data=_SLEEP, headers=_JSON) as response:
        await response.read()
        return response.status


async def _metric(mesh: Mesh, session: aiohttp.ClientSession, name: str, **labels: str) -> float:
    """Return the sum of a metric over the instances of the drill's net, of the samples with some labels."""
    found = 0.0
    for part in mesh.of_kind("front"):
        if part.name.startswith("drill"):
            port = re.findall(r'"http_port": ?(\d+)', part.log())[-1]
            async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                text = await response.text()
            found += sum(
                sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == f"atserving_evaluator_{name}" and labels.items() <= sample.labels.items()
            )
    return found


async def _gate_stops(mesh: Mesh, session: aiohttp.ClientSession) -> tuple[str, str]:
    """Register instances that are not there, ask for their app, and stop a gate."""
    (release,) = (each for each in mesh.serves if each.app == "quick")
    served = Served(_DEAD_APP, "v1", release.tar, 0, release.custom_values)
    await publish(mesh.registries[0], served.release())
    async with EtcdClient(Connection(mesh.etcds)) as client:
        for number in range(_DEAD):
            one = {"address": f"127.0.0.1:{mesh.slow_port}", "capacity": 8}
            await client.put(instance_key(_DEAD_APP, "v1", f"i{number}"), orjson.dumps(one).decode())
    await mesh.until_listed(served, _DEAD)
    for _ in range(_BOTH_GATES):
        # Its connections open with the first request.
        await _status(mesh, session, _DEAD_APP)
    gate = mesh.parts["gate-0"]
    began_s = time.monotonic()
    await gate.stop()
    took_s = time.monotonic() - began_s
    gate.start()
    await mesh.etcdctl("del", "--prefix", f"{PREFIX}instance/{_DEAD_APP}/")
    return f"a gate with {_DEAD} dead instances stops", f"{took_s:.1f} s, of which 3 s are its drain"


async def _run() -> None:
    began = Moment.now()
    async with (
        Mesh(serves) as mesh,
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(_PATIENCE_S), connector=aiohttp.TCPConnector(limit=0)
        ) as session,
    ):
        rows = [await _worker_returns(mesh, session)]
        rows += await _refusals(mesh, session)
        rows.append(await _gate_stops(mesh, session))
    table = [(what, before.BY_HAND.get(what, ""), now) for what, now in rows]
    print(markdown_table(("what", "before", "now"), table))
    print(f"others used {(await asyncio.to_thread(Moment.now)).others_since(began):g} cores")


if __name__ == "__main__":
    run_until_stopped(_run())
