"""A call that needs long to travel says nothing of the instance: the gate goes on using it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from atserving import link
from atserving.v1 import evaluator_pb2, serving_pb2
from gate.admission import Caller
from gate.dispatch import CallContext, Task
from tests.gate.test_away import endpoint, freeze
from tests.gate.test_dispatch import Evaluator, Mesh, json_of, running_mesh, task
from tests.instance import ScriptedInstance
from tests.slow_link import RATE, SlowLink, slow_link
from tests.waiting import until

BYTES = int(4 * RATE)
"""The body of an upload that takes 4 s."""


@asynccontextmanager
async def slow_mesh(evaluator: Evaluator, *, built_in: bool) -> AsyncIterator[tuple[Mesh, ScriptedInstance, SlowLink]]:
    """Run a mesh with one instance, behind a slow link."""
    server = ScriptedInstance(evaluator.infer, "app", "v1", evaluator.name, built_in=built_in)
    instance = await server.start()
    async with slow_link(instance.address) as slow, running_mesh() as mesh:
        mesh.put(instance.key, msgspec.structs.replace(instance, address=slow.address))
        mesh.instance_keys.add(instance.key)
        yield mesh, server, slow
    await server.stop()


async def upload(mesh: Mesh) -> str:
    request = evaluator_pb2.InferRequest(data=[serving_pb2.Resource(body=bytes(BYTES))])
    return json_of(await mesh.dispatcher.eval(Task("app", "", request), CallContext("reqid", Caller())))


@pytest.mark.parametrize("built_in", [False, True])
async def test_a_slow_upload_keeps_its_instance_in_use(built_in: bool) -> None:
    here, other = Evaluator("here"), Evaluator("other")
    async with slow_mesh(here, built_in=built_in) as (mesh, server, slow):
        await mesh.eval()
        began_s = time.monotonic()
        uploading = asyncio.create_task(upload(mesh))
        await until(lambda: slow.passed > BYTES // 8)
        await mesh.add(other, built_in=built_in)
        connection = endpoint(mesh, "here").connection
        asked = 0
        while not uploading.done():
            assert not connection.is_away
            # The gate would prefer the other instance, which is idle.
            answer = connection.ask(evaluator_pb2.InferRequest(), time.monotonic() + 60, "small", None)
            both: set[asyncio.Future[Any]] = {answer, uploading}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            asked += answer.done()
        assert await uploading == '"here:"'
        assert time.monotonic() - began_s > 3
        assert asked > 1
        assert not other.received
        assert not any(flags & link.STAY for flags in server.flags)


async def test_an_instance_that_only_receives_a_slow_upload_is_not_silent() -> None:
    async with slow_mesh(Evaluator("here"), built_in=False) as (mesh, _, _):
        uploading = asyncio.create_task(upload(mesh))
        while not (await asyncio.wait({uploading}, timeout=0.02))[0]:
            assert not endpoint(mesh, "here").connection.is_away
        assert await uploading == '"here:"'


async def test_an_answer_that_arrives_slowly_is_not_asked_of_another_instance() -> None:
    here, other = Evaluator("here", stream=bytes(BYTES)), Evaluator("other")
    async with slow_mesh(here, built_in=True) as (mesh, _, _):
        began_s = time.monotonic()
        asking = asyncio.create_task(mesh.dispatcher.eval(task(), CallContext("reqid", Caller())))
        await until(lambda: bool(here.received))
        await mesh.add(other, built_in=True)
        await asking
        assert time.monotonic() - began_s > 3
        assert not other.received
        assert endpoint(mesh, "here").connection._pace._usual_s < 1


async def test_a_slow_upload_teaches_nothing_of_the_pace() -> None:
    async with slow_mesh(Evaluator("here"), built_in=True) as (mesh, _, _):
        await upload(mesh)
        # It was all of 4 s before.
        assert endpoint(mesh, "here").connection._pace._usual_s < 1


async def test_an_upload_to_an_instance_that_freezes_is_answered_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before its link counts as dead."""
    monkeypatch.setattr(link, "_MOST_SILENT", 1 << 30)
    async with slow_mesh(Evaluator("frozen"), built_in=False) as (mesh, server, slow):
        uploading = asyncio.create_task(upload(mesh))
        await until(lambda: slow.passed > BYTES // 8)
        slow.reads.clear()
        freeze(server)
        await mesh.add(Evaluator("free"))
        assert await uploading == '"free:"'


async def test_an_upload_that_reached_nobody_whole_is_asked_of_a_third_instance() -> None:
    """Links that break under it tell nothing: no instance has begun it."""
    last = Evaluator("last")
    async with slow_mesh(Evaluator("first"), built_in=False) as (mesh, first, to_first):
        await mesh.eval()
        uploading = asyncio.create_task(upload(mesh))
        await until(lambda: to_first.passed > BYTES // 8)
        async with slow_mesh_beside(mesh, Evaluator("second")) as (second, to_second):
            await first.stop()
            await until(lambda: to_second.passed > BYTES // 8)
            await mesh.add(last)
            await second.stop()
            assert await uploading == '"last:"'


@asynccontextmanager
async def slow_mesh_beside(mesh: Mesh, evaluator: Evaluator) -> AsyncIterator[tuple[ScriptedInstance, SlowLink]]:
    """Add an instance behind a slow link to a mesh."""
    server = ScriptedInstance(evaluator.infer, "app", "v1", evaluator.name)
    instance = await server.start()
    async with slow_link(instance.address) as slow:
        mesh.put(instance.key, msgspec.structs.replace(instance, address=slow.address))
        mesh.instance_keys.add(instance.key)
        yield server, slow
