"""Long calls and replies travel in pieces, so that others need not wait for their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atserving import frames, link
from atserving.errors import Unavailable
from atserving.held import HeldBytes
from atserving.v1.evaluator_pb2 import Hello, InferRequest, InferResponse
from evaluator.serving.link_server import Replier
from gate.bodies import Body
from gate.connection import EvaluatorConnection
from gate.responses import Response
from tests.evaluator.calling import whole
from tests.instance import ScriptedInstance
from tests.waiting import until

WAIT_S = 60.0
LONG = 40 << 20
KIND = 9
MOST = 1 << 20


async def never(_: InferRequest) -> InferResponse:
    raise AssertionError


class Answered:
    """A request that has its reply."""

    ended = True

    def abandon(self) -> None: ...

    def expire(self) -> None: ...


class Instance(ScriptedInstance):
    """Answers at once: a request with the params ``long`` by a long result, others by the length of their body."""

    def __init__(self) -> None:
        super().__init__(never)
        self.lengths: list[int] = []
        """The bodies of the calls, in the order of their arrival."""

    def begin(self, call: link.Call, replier: Replier, held: int | None = None) -> Answered:  # type: ignore[override]
        self.links.held.give(held or 0)
        request = InferRequest.FromString(bytes(call.request))
        self.lengths.append(len(request.data[0].body) if request.data else 0)
        is_long = request.params_json == "long"
        response = InferResponse(result_json="x" * LONG if is_long else str(self.lengths[-1]))
        replier.reply(link.Reply(call.id, link.RESULT, 0, 0, 0, 0, 0, 0, response.SerializeToString()))
        return Answered()

    @property
    def unsent_bytes(self) -> int:
        (gate,) = self.links.links
        return gate.unsent_bytes


@asynccontextmanager
async def serving(held: HeldBytes | None = None) -> AsyncIterator[tuple[Instance, EvaluatorConnection]]:
    server = Instance()
    connection = EvaluatorConnection(await server.start(), WAIT_S, held)
    try:
        yield server, connection
    finally:
        await connection.close()
        await server.stop()


def ask(connection: EvaluatorConnection, params: str = "", body: int = 0) -> asyncio.Future[Response]:
    large = Body([b"x" * body]) if body else None
    return connection.ask(InferRequest(params_json=params), time.monotonic() + WAIT_S, "r", None, large)


async def result(answer: asyncio.Future[Response]) -> str:
    """Return the JSON document of an answer."""
    return (await whole(answer)).result_json


async def test_short_reply_overtakes_a_long_one() -> None:
    async with serving() as (_, connection):
        long, short = ask(connection, "long"), ask(connection)
        await short
        assert not long.done()
        assert len(await result(long)) == LONG


async def test_short_call_overtakes_a_long_one() -> None:
    async with serving() as (server, connection):
        answers = [ask(connection, body=LONG), ask(connection)]
        assert [await result(each) for each in answers] == [str(LONG), "0"]
        assert server.lengths == [0, LONG]


async def test_long_frames_take_turns() -> None:
    async with serving() as (server, connection):
        sizes = [LONG, LONG // 2, LONG // 4]
        answers = [ask(connection, body=size) for size in sizes]
        assert [await result(each) for each in answers] == list(map(str, sizes))
        assert server.lengths == sorted(sizes)


async def test_abandoned_long_reply_is_not_sent_to_its_end() -> None:
    held = HeldBytes(1 << 30)
    async with serving(held) as (server, connection):
        long = ask(connection, "long")
        await until(lambda: held.held == LONG + link.REPLY_HEAD.size + 5)
        long.cancel()
        assert held.held == 0
        await until(lambda: not server.unsent_bytes)
        # What was still on its way is skipped.
        assert await result(ask(connection)) == "0"
        assert len(await result(ask(connection, "long"))) == LONG
        assert held.held == 0


async def test_abandoned_long_call_is_not_sent_to_its_end() -> None:
    async with serving() as (server, connection):
        await ask(connection)
        long = ask(connection, body=LONG)
        link_ = connection._link
        assert link_
        await until(lambda: link_.unsent_bytes > 0)
        long.cancel()
        assert await result(ask(connection)) == "0"
        assert server.lengths == [0, 0]
        (gate,) = server.links.links
        await until(lambda: not gate.reader._longs)


async def test_answer_without_room_is_refused_before_it_arrives() -> None:
    held = HeldBytes(LONG)
    async with serving(held) as (server, connection):
        with pytest.raises(Unavailable, match="as many bytes as it may") as caught:
            await ask(connection, "long")
        assert caught.value.retry_after_s
        assert held.held == 0
        assert await result(ask(connection)) == "0"
        await until(lambda: not server.unsent_bytes)


async def test_link_closes_after_the_end_of_a_long_reply() -> None:
    async with serving() as (server, connection):
        long = ask(connection, "long")
        await until(lambda: len(server.lengths) == 1)
        await server.links.stop(WAIT_S)
        assert len(await result(long)) == LONG


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.booleans(), st.data())
def test_pieces_are_put_together_however_they_arrive(lengths: list[int], into_space: bool, data: st.DataObject) -> None:
    payloads = {id_: bytes((id_ + at) % 251 for at in range(length)) for id_, length in enumerate(lengths)}
    left = dict.fromkeys(payloads, 0)
    stream = b""
    while left:
        id_ = data.draw(st.sampled_from(sorted(left)))
        end = data.draw(st.integers(left[id_] + 1, lengths[id_]))
        stream += piece(id_, payloads[id_][left[id_] : end], left[id_], lengths[id_])
        left[id_] = end
        if end == lengths[id_]:
            del left[id_]
        stream += link.frame(3, b"short" * data.draw(st.integers(0, 2)))
    taken: list[bytes] = []
    reader = frames.FrameReader(
        lambda kind, part, start, end: taken.append(bytes(part[start:end])) if kind == KIND else None,
        max_long_bytes=MOST,
    )
    at = 0
    while at < len(stream):
        space = reader.space()
        count = min(data.draw(st.integers(1, 5000)), len(stream) - at)
        if into_space:
            count = min(count, len(space))
            space[:count] = stream[at : at + count]
            if (rest := reader.filled(count)) is not None:
                reader.feed(rest)
        else:
            reader.feed(stream[at : at + count])
        at += count
    assert sorted(taken) == sorted(payloads.values())
    assert reader.partial_bytes == 0


def piece(id_: int, payload: bytes, offset: int, total: int, kind: int = KIND) -> bytes:
    return link.frame(frames.PIECE, frames.PIECE_HEAD.pack(id_, kind, total, offset) + payload)


@pytest.mark.parametrize(
    "sent",
    [
        piece(1, b"", 0, 10),
        piece(1, b"x" * 11, 0, 10),
        piece(1, b"x", 0, MOST + 1),
        piece(1, b"x", 0, 10, kind=frames.PIECE),
        piece(1, b"x", 0, 10) + piece(1, b"x", 0, 10),
        piece(1, b"x", 0, 10) + piece(1, b"x", 2, 10),
        piece(1, b"x", 0, 10) + piece(1, b"x", 1, 11),
        piece(1, b"x", 0, 10) + piece(1, b"x", 1, 10, kind=KIND + 1),
        link.HEAD.pack(3, frames.PIECE) + b"x" * 100,
    ],
)
def test_pieces_that_do_not_fit_are_malformed(sent: bytes) -> None:
    reader = frames.FrameReader(lambda *_: None, MOST, MOST)
    with pytest.raises(link.Malformed):
        reader.feed(sent)


def test_rest_of_a_dropped_frame_is_skipped() -> None:
    taken: list[bytes] = []
    reader = frames.FrameReader(
        lambda kind, part, start, end: taken.append(bytes(part[start:end])), max_long_bytes=MOST
    )
    reader.feed(piece(1, b"x" * 10, 0, 30))
    reader.drop(1)
    reader.feed(piece(1, b"x" * 10, 10, 30) + piece(2, b"y" * 5, 0, 5) + piece(1, b"x" * 10, 20, 30))
    assert taken == [b"y" * 5]


@pytest.mark.parametrize(
    "part",
    [
        link.HEAD.pack(100, link.CALL)[:3],
        link.HEAD.pack(100_000, link.CALL) + b"x",
        piece(1, b"x", 0, MOST, kind=link.CALL),
        piece(1, b"x" * 9, 0, MOST, kind=link.CALL)[:-1],
    ],
    ids=["a head", "a frame", "between pieces", "a piece"],
)
async def test_an_instance_is_busy_while_a_call_has_arrived_in_part(
    part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ALIVE_S", 0.02)
    # It sends no ALIVE while it is idle.
    monkeypatch.setattr(link, "_IDLE_TURNS", 1 << 30)
    async with serving() as (server, _):
        assert server.links.instance
        host, _, port = server.links.instance.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        hello = link.frame(link.HELLO, Hello(app="a", version="v", instance="i").SerializeToString())
        writer.write(link.PREFACE + hello + part)
        greeting = link.PREFACE + hello
        assert await reader.readexactly(len(greeting)) == greeting
        async with asyncio.timeout(WAIT_S):
            assert await reader.readexactly(link.HEAD.size) == link.frame(link.ALIVE)
        writer.close()
