"""A gate asks others than an instance that is away, and one other if an instance is far slower than usual."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from atserving import link
from atserving.config import Instance
from atserving.errors import DeadlineExceeded, ResourceExhausted, ServingError, Unavailable
from atserving.v1 import evaluator_pb2
from gate import connection, pace
from gate.endpoint import Endpoint
from tests.gate.test_dispatch import DRAINING, FULL, Evaluator, Mesh, running_mesh
from tests.instance import ScriptedInstance
from tests.waiting import until

AWAY = evaluator_pb2.Error(code=503, status=503, message="away", retry_after_ms=1000, refused=True)
BAD_IMAGE = evaluator_pb2.Error(code=400, status=400, message="bad image")


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with running_mesh() as mesh:
        yield mesh


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call be late soon."""
    monkeypatch.setattr(pace, "LEAST_LATE_S", 0.02)
    monkeypatch.setattr(pace, "_FACTOR", 0.0)
    monkeypatch.setattr(connection, "_LOOK_S", 0.01)
    monkeypatch.setattr(connection, "_HEDGE_AGAIN_S", 0.02)


def endpoint(mesh: Mesh, name: str) -> Endpoint[connection.EvaluatorConnection]:
    """Return the gate's view of an instance."""
    return next(each for pool in mesh.router._endpoints.values() for id_, each in pool.items() if id_ == name)


async def set_away(mesh: Mesh, server: ScriptedInstance, name: str, is_away: bool = True) -> None:
    """Let an instance say that it is away, and wait until the gate knows."""
    server.links.set_away(is_away)
    await until(lambda: endpoint(mesh, name).connection.is_away == is_away)


async def test_an_instance_that_is_away_gets_no_request_while_another_has_room(mesh: Mesh) -> None:
    away = await mesh.add(Evaluator("a"))
    await mesh.add(Evaluator("b"))
    assert {await mesh.eval() for _ in range(40)} == {'"a:"', '"b:"'}
    await set_away(mesh, away, "a")
    assert {await mesh.eval() for _ in range(40)} == {'"b:"'}
    await set_away(mesh, away, "a", False)
    assert {await mesh.eval() for _ in range(40)} == {'"a:"', '"b:"'}


async def test_a_gate_that_connects_meanwhile_hears_that_an_instance_is_away(mesh: Mesh) -> None:
    away = Evaluator("a")
    server = ScriptedInstance(away.infer, "app", "v1", "a")
    server.links.set_away(True)
    instance = await server.start()
    mesh.put(instance.key, instance)
    await until(lambda: endpoint(mesh, "a").connection.is_away)
    await server.stop()
    await until(lambda: not endpoint(mesh, "a").connection.is_away, what="a broken link says nothing")
    mesh.delete(instance.key)


async def test_an_only_instance_that_is_away_keeps_the_requests(mesh: Mesh) -> None:
    server = await mesh.add(Evaluator("a"))
    await mesh.eval()
    await set_away(mesh, server, "a")
    await mesh.eval()
    await mesh.eval(uri="http://host/a")
    assert server.flags == [0, link.STAY, link.STAY | link.FETCH]


async def test_an_instance_that_is_away_is_used_once_all_others_are_full(mesh: Mesh) -> None:
    server = await mesh.add(Evaluator("a"))
    await mesh.add(Evaluator("b", FULL))
    await set_away(mesh, server, "a")
    assert await mesh.eval() == '"a:"'
    assert server.flags == [link.STAY]


async def test_a_request_that_is_handed_back_is_taken_by_another(mesh: Mesh) -> None:
    away = Evaluator("a", AWAY, hold=asyncio.Event())
    await mesh.add(away)
    request = asyncio.create_task(mesh.eval())
    await away.entered.wait()
    await mesh.add(Evaluator("b"))
    assert away.hold
    away.hold.set()
    assert await request == '"b:"'


@pytest.mark.parametrize("other", [None, FULL, DRAINING])
async def test_a_request_that_is_handed_back_stays_if_nobody_else_takes_it(
    mesh: Mesh, other: evaluator_pb2.Error | None
) -> None:
    evaluator = Evaluator("a", AWAY)
    server = await mesh.add(evaluator)

    def keep() -> None:
        if link.STAY in server.flags:
            evaluator.error = None

    evaluator.on_request = keep
    if other:
        await mesh.add(Evaluator("b", other))
        # Both instances are asked in the course of this.
        while len(server.flags) < 2:
            assert await mesh.eval() == '"a:"'
    else:
        assert await mesh.eval() == '"a:"'
    assert server.flags[:2] == [0, link.STAY]


async def test_an_instance_that_does_not_keep_what_stays_is_asked_twice_at_most(mesh: Mesh) -> None:
    server = await mesh.add(Evaluator("a", AWAY))
    with pytest.raises(Unavailable):
        await mesh.eval()
    assert server.flags == [0, link.STAY]


async def test_full_instances_stay_a_429(mesh: Mesh) -> None:
    await set_away(mesh, await mesh.add(Evaluator("a", FULL)), "a")
    await mesh.add(Evaluator("b", FULL))
    with pytest.raises(ResourceExhausted):
        await mesh.eval()


@pytest.mark.usefixtures("impatient")
async def test_a_request_that_takes_too_long_is_answered_by_another_instance(mesh: Mesh) -> None:
    slow, free = Evaluator("slow", hold=asyncio.Event()), Evaluator("free")
    await mesh.add(slow, built_in=True)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    await mesh.add(free, built_in=True)
    assert await request == '"free:"'
    await slow.cancelled.wait()
    assert len(free.received) == 1
    assert not endpoint(mesh, "slow").in_flight
    assert not endpoint(mesh, "free").in_flight


@pytest.mark.usefixtures("impatient")
async def test_the_first_answer_counts_and_the_other_call_is_cancelled(mesh: Mesh) -> None:
    slow, other = Evaluator("slow", hold=asyncio.Event()), Evaluator("other", hold=asyncio.Event())
    await mesh.add(slow, built_in=True)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    await mesh.add(other, built_in=True)
    await other.entered.wait()
    assert slow.hold
    slow.hold.set()
    assert await request == '"slow:"'
    await other.cancelled.wait()


@pytest.mark.usefixtures("impatient")
async def test_a_caller_that_leaves_takes_both_calls_back(mesh: Mesh) -> None:
    slow, other = Evaluator("slow", hold=asyncio.Event()), Evaluator("other", hold=asyncio.Event())
    await mesh.add(slow, built_in=True)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    await mesh.add(other, built_in=True)
    await other.entered.wait()
    request.cancel()
    await slow.cancelled.wait()
    await other.cancelled.wait()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [FULL, DRAINING, AWAY])
async def test_a_refusal_of_the_other_instance_changes_nothing(mesh: Mesh, error: evaluator_pb2.Error) -> None:
    slow, other = Evaluator("slow", hold=asyncio.Event()), Evaluator("other", error)
    await mesh.add(slow, built_in=True)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    await mesh.add(other, built_in=True)
    await other.entered.wait()
    await until(lambda: not endpoint(mesh, "other").in_flight or request.done())
    assert slow.hold
    slow.hold.set()
    assert await request == '"slow:"'


@pytest.mark.usefixtures("impatient")
async def test_an_error_of_the_net_is_an_answer(mesh: Mesh) -> None:
    slow = Evaluator("slow", hold=asyncio.Event())
    await mesh.add(slow, built_in=True)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    await mesh.add(Evaluator("other", BAD_IMAGE), built_in=True)
    with pytest.raises(ServingError, match="bad image"):
        await request


@pytest.mark.usefixtures("impatient")
async def test_a_hedged_request_loses_two_instances_at_most(mesh: Mesh) -> None:
    evaluators = [Evaluator(name, hold=asyncio.Event()) for name in "abc"]
    servers = [await mesh.add(evaluators[0], built_in=True)]
    request = asyncio.create_task(mesh.eval())
    await evaluators[0].entered.wait()
    servers += [await mesh.add(each, built_in=True) for each in evaluators[1:]]
    await until(lambda: sum(bool(each.received) for each in evaluators) == 2)
    for evaluator, server in zip(evaluators, servers, strict=True):
        if evaluator.received:
            await server.stop()
    with pytest.raises(Unavailable, match="2 instances of app 'app' were lost"):
        await request
    assert sum(len(each.received) for each in evaluators) == 2


@pytest.mark.usefixtures("impatient")
async def test_deadline_of_a_hedged_request(mesh: Mesh) -> None:
    slow, other = Evaluator("slow", hold=asyncio.Event()), Evaluator("other", hold=asyncio.Event())
    await mesh.add(slow, built_in=True)
    await mesh.add(other, built_in=True)
    timeout_s = 0.1
    while not (slow.received and other.received):
        timeout_s *= 2
        with pytest.raises(DeadlineExceeded):
            await mesh.eval(timeout_s)
    await slow.cancelled.wait()
    await other.cancelled.wait()


@pytest.mark.usefixtures("impatient")
async def test_a_request_that_stays_is_taken_by_another_instance_once_one_has_room(mesh: Mesh) -> None:
    """Also one for a script: nothing works on it while its instance is away."""
    away, other = Evaluator("away", hold=asyncio.Event()), Evaluator("other")
    server = await mesh.add(away)
    await set_away(mesh, server, "away")
    request = asyncio.create_task(mesh.eval())
    await away.entered.wait()
    await mesh.add(other)
    assert await request == '"other:"'
    await away.cancelled.wait()


@pytest.mark.usefixtures("impatient")
async def test_a_request_for_a_script_that_stayed_and_now_runs_is_not_asked_elsewhere(mesh: Mesh) -> None:
    """Also if its instance goes away again: the script would run twice."""
    away, other = Evaluator("away", hold=asyncio.Event()), Evaluator("other")
    server = await mesh.add(away)
    await set_away(mesh, server, "away")
    stayed = asyncio.create_task(mesh.eval())
    await away.entered.wait()
    await set_away(mesh, server, "away", False)
    await set_away(mesh, server, "away")
    await mesh.add(other)
    await answered_after(mesh, away, stayed)
    assert not other.received


@pytest.mark.usefixtures("impatient")
async def test_a_handed_back_request_for_a_script_that_an_instance_runs_is_not_asked_elsewhere(mesh: Mesh) -> None:
    """The instance was back when the request came to stay."""
    back, other = Evaluator("back", AWAY, hold=asyncio.Event()), Evaluator("other")
    server = await mesh.add(back)

    def keep() -> None:
        assert back.hold
        if link.STAY not in server.flags:
            back.hold.set()
        else:
            back.hold.clear()
            back.error = None

    back.on_request = keep
    request = asyncio.create_task(mesh.eval())
    await until(lambda: back.error is None)
    await set_away(mesh, server, "back")
    await mesh.add(other)
    await answered_after(mesh, back, request)
    assert not other.received


async def test_a_gate_uses_the_instances_that_speak_its_version_of_the_link(mesh: Mesh) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(link.MAGIC + bytes([link.PROTOCOL - 1]))
        await reader.read()
        writer.close()

    old = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{old.sockets[0].getsockname()[1]}"
    instance = Instance(app="app", version="v1", id="old", address=address, capacity=64)
    with capture_logs() as logs:
        mesh.put(instance.key, instance)
        mesh.instance_keys.add(instance.key)
        with pytest.raises(Unavailable):
            await mesh.eval()
        new = Evaluator("new")
        await mesh.add(new)
        for _ in range(20):
            # Also once it may be asked again after a failure.
            mesh.later_s += 1
            assert await mesh.eval() == '"new:"'
    reason = f"the peer speaks version {link.PROTOCOL - 1} of the link, this end version {link.PROTOCOL}"
    assert {"event": "link broken", "log_level": "warning", "reason": reason} in logs
    assert {(each["instance"], each["reason"]) for each in logs if each["event"] == "instance lost"} == {
        ("old", reason)
    }
    assert len(new.received) == 20
    old.close()


def freeze(server: ScriptedInstance) -> None:
    """Let an instance take what it gets, and send nothing more."""
    (gate,) = server.links.links
    gate.send = lambda *_: None  # type: ignore[method-assign]


@pytest.mark.parametrize(("built_in", "uri"), [(False, ""), (True, "http://host/a"), (False, "http://host/a")])
async def test_requests_of_a_frozen_instance_are_asked_of_another(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, built_in: bool, uri: str
) -> None:
    """Long before its link counts as dead; of every kind, and more than may be hedged."""
    monkeypatch.setattr(link, "ALIVE_S", 0.05)
    monkeypatch.setattr(link, "_MOST_SILENT", 1 << 30)
    frozen, free = Evaluator("frozen", hold=asyncio.Event()), Evaluator("free")
    server = await mesh.add(frozen, built_in=built_in)
    requests = [asyncio.create_task(mesh.eval(uri=uri)) for _ in range(8)]
    await until(lambda: frozen.in_flight == 8)
    freeze(server)
    await mesh.add(free, built_in=built_in)
    assert await asyncio.gather(*requests) == ['"free:"'] * 8
    # New ones do not go there.
    assert endpoint(mesh, "frozen").connection.is_away or endpoint(mesh, "frozen").is_idle
    assert await mesh.eval(uri=uri) == '"free:"'
    await until(lambda: frozen.in_flight == 0, what="the calls are cancelled")


async def test_a_busy_instance_that_works_on_long_calls_is_not_silent(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ALIVE_S", 0.05)
    slow, free = Evaluator("slow", hold=asyncio.Event()), Evaluator("free")
    await mesh.add(slow)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    await mesh.add(free)
    await answered_after(mesh, slow, request)
    assert not free.received


async def answered_after(mesh: Mesh, slow: Evaluator, request: asyncio.Task[str]) -> None:
    """Check that only the slow instance answers, after the gate has looked at its calls for a while."""
    await asyncio.sleep(0.3)
    assert slow.hold
    slow.hold.set()
    assert await request == f'"{slow.name}:"'
    assert not endpoint(mesh, slow.name).in_flight


@pytest.mark.usefixtures("impatient")
async def test_scripts_and_fetches_are_not_hedged(mesh: Mesh) -> None:
    for built_in, uri in ((False, ""), (True, "http://host/a")):
        slow, free = Evaluator("slow", hold=asyncio.Event()), Evaluator("free")
        keys = set(mesh.instance_keys)
        await mesh.add(slow, built_in=built_in)
        request = asyncio.create_task(mesh.eval(uri=uri))
        await slow.entered.wait()
        await mesh.add(free, built_in=built_in)
        await answered_after(mesh, slow, request)
        assert not free.received
        for key in mesh.instance_keys - keys:
            mesh.delete(key)


@pytest.mark.usefixtures("impatient")
async def test_an_instance_that_is_half_full_or_away_takes_no_hedge_until_it_has_room(mesh: Mesh) -> None:
    slow, other = Evaluator("slow", hold=asyncio.Event()), Evaluator("other", hold=asyncio.Event())
    await mesh.add(slow, built_in=True)
    request = asyncio.create_task(mesh.eval())
    await slow.entered.wait()
    server = await mesh.add(other, built_in=True)
    server.links.set_away(True)
    busy = endpoint(mesh, "other")
    busy.in_flight = 5
    await until(lambda: busy.connection.is_away)
    await asyncio.sleep(0.2)
    await set_away(mesh, server, "other", False)
    await asyncio.sleep(0.2)
    assert not other.received
    busy.in_flight = 4
    await other.entered.wait()
    assert other.hold
    other.hold.set()
    assert await request == '"other:"'


@pytest.mark.usefixtures("impatient")
async def test_hedges_have_a_budget(mesh: Mesh) -> None:
    slow, free = Evaluator("slow", hold=asyncio.Event()), Evaluator("free")
    await mesh.add(slow, built_in=True)
    requests = [asyncio.create_task(mesh.eval()) for _ in range(8)]
    await until(lambda: slow.in_flight == 8)
    await mesh.add(free, built_in=True)
    await until(lambda: len(free.received) == 4)
    await asyncio.sleep(0.2)
    assert len(free.received) == 4
    assert slow.hold
    slow.hold.set()
    assert sorted([await each for each in requests]) == ['"free:"'] * 4 + ['"slow:"'] * 4
