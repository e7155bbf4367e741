"""A front counts each answer until it has left, and no longer: slow gates neither fill its memory nor block it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from atserving import link
from atserving.config import Instance
from atserving.held import HeldBytes
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from evaluator.serving.link_server import LinkServer, Replier
from tests.evaluator.serving.raw_gate import RawGate
from tests.instance import ScriptedInstance
from tests.waiting import until

MIB = 1 << 20


class Answered:
    """A request that has its reply."""

    ended = True

    def abandon(self) -> None: ...

    def expire(self) -> None: ...


class Answering(ScriptedInstance):
    """Answers each call at once, by as many bytes as its timeout in microseconds."""

    def __init__(self, held: HeldBytes) -> None:
        async def never(_: InferRequest) -> InferResponse:
            raise AssertionError

        super().__init__(never)
        self.links = LinkServer(held)
        self.refused: list[int] = []

    def begin(self, call: link.Call, replier: Replier, held: int | None = None) -> Answered:  # type: ignore[override]
        count = call.timeout_us
        large = count >= 1 << 16
        if large and not replier.hold(count):
            self.refused.append(call.id)
            replier.reply(link.Reply(call.id, link.ERROR, 0, 0, 0, 0, 0, 0, b""))
        else:
            replier.reply(link.Reply(call.id, link.RESULT, 0, 0, 0, 0, 0, 0, bytes(count)), count if large else 0)
        return Answered()


@asynccontextmanager
async def serving(held: HeldBytes) -> AsyncIterator[tuple[Answering, Instance]]:
    server = Answering(held)
    try:
        yield server, await server.start()
    finally:
        await server.stop()


def call(id_: int, length: int) -> bytes:
    """Return a call that is answered by so many bytes."""
    return link.call_head(id_, length, 0, b"", b"", 0)


@pytest.mark.parametrize("size", [100 << 10, 400 << 10, 3 * MIB, 20 * MIB])
async def test_a_steady_flow_of_large_answers_is_never_refused(size: int) -> None:
    """Each answer is followed by another, before all of them have left."""
    few = 3 if size > 10 * MIB else 8
    held = HeldBytes(128 * MIB)
    async with serving(held) as (server, instance), RawGate(instance.address) as gate:
        ids = itertools.count(1)
        for _ in range(few):
            await gate.send(call(next(ids), size))
        for _ in range(max(10, 400 * MIB // size)):
            assert len((await gate.reply()).response) == size
            await gate.send(call(next(ids), size))
        assert server.refused == []


async def test_unread_answers_are_refused_until_they_are_read() -> None:
    held = HeldBytes(64 * MIB)
    async with serving(held) as (server, instance), RawGate(instance.address) as gate:
        # The sockets take some of the first two.
        for id_ in range(1, 4):
            await gate.send(call(id_, 20 * MIB))
        await until(lambda: server.refused == [3])
        # A cancelled one counts until what is on its way has left.
        await gate.send(link.cancel_frame([2]))
        replies = [await gate.reply() for _ in range(2)]
        assert sorted(reply.id for reply in replies) == [1, 3]
        await gate.send(call(4, 20 * MIB) + call(5, 20 * MIB))
        for _ in range(2):
            assert len((await gate.reply()).response) == 20 * MIB


async def test_small_answers_that_are_not_read_count() -> None:
    held = HeldBytes(8 * MIB)
    async with serving(held) as (_, instance), RawGate(instance.address) as gate:
        ids = itertools.count(1)

        async def ask_on() -> None:
            while True:
                await gate.send(b"".join(call(next(ids), 50_000) for _ in range(10)))

        with pytest.raises(ConnectionError):
            await ask_on()
        await until(lambda: held.held == 0)
        # So does what it reads in the end.
        async with RawGate(instance.address) as other:
            await other.send(call(1, 50_000))
            assert len((await other.reply()).response) == 50_000


async def test_the_id_of_an_answer_that_leaves_is_not_used_again() -> None:
    held = HeldBytes(128 * MIB)
    async with serving(held) as (_, instance):
        async with RawGate(instance.address) as gate:
            await gate.send(call(1, 20 * MIB))
            await until(lambda: held.held == 20 * MIB)
            await gate.send(call(1, 20 * MIB))
            with pytest.raises((EOFError, ConnectionError)):
                await gate.reply()
        await until(lambda: held.held == 0)
