"""The link between gate and instance loses, repeats and mixes up no call. Both ends are real, over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from atserving import frames, link
from atserving.config import Instance
from atserving.held import HeldBytes
from atserving.v1.evaluator_pb2 import Hello, InferRequest, InferResponse
from evaluator.serving.link_server import LinkServer
from gate.answers import TransportError
from gate.connection import EvaluatorConnection
from tests.evaluator import calling
from tests.instance import ScriptedInstance

WAIT_S = 60.0


@dataclass
class Echo:
    """Replies with the request's params after ``wait``; counts its calls and cancellations by params."""

    wait: Callable[[str], Awaitable[object]] | None = None
    ran: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def infer(self, request: InferRequest) -> InferResponse:
        name = request.params_json
        self.ran[name] += 1
        self.changed.set()
        try:
            if self.wait:
                await self.wait(name)
        except asyncio.CancelledError:
            self.cancelled[name] += 1
            self.changed.set()
            raise
        return InferResponse(result_json=name)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def forever(_: str) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def serving(echo: Echo, port: int = 0) -> AsyncIterator[tuple[ScriptedInstance, EvaluatorConnection, int]]:
    server = ScriptedInstance(echo.infer)
    instance = await server.start(port)
    connection = EvaluatorConnection(instance, connect_timeout_s=WAIT_S)
    try:
        yield server, connection, int(instance.address.rpartition(":")[2])
    finally:
        await connection.close()
        await server.stop()


def ask(connection: EvaluatorConnection, name: str, timeout_s: float = WAIT_S) -> asyncio.Future[InferResponse]:
    answer = connection.ask(InferRequest(params_json=name), time.monotonic() + timeout_s, "r", None)
    # It is no large one.
    return cast(asyncio.Future[InferResponse], answer)


async def ask_until_up(connection: EvaluatorConnection, name: str) -> InferResponse:
    """Ask until the connection is up."""
    while True:
        try:
            return await ask(connection, name)
        except TransportError as error:
            assert not error.reached
            await asyncio.sleep(0.01)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_each_call_gets_its_own_reply_in_any_order_of_completion(data: st.DataObject, count: int) -> None:
    names = [str(number) for number in range(count)]
    order = data.draw(st.permutations(names))
    cancelled = data.draw(st.sets(st.sampled_from(names)))

    async def run() -> None:
        ready = {name: asyncio.Event() for name in names}
        echo = Echo(lambda name: ready[name].wait())
        async with serving(echo) as (_, connection, _):
            answers = {name: ask(connection, name) for name in names}
            await echo.until(lambda: echo.ran.total() == count)
            for name in cancelled:
                answers[name].cancel()
            await echo.until(lambda: set(echo.cancelled) == cancelled)
            for name in order:
                ready[name].set()
            outcomes = await asyncio.gather(*answers.values(), return_exceptions=True)
        for name, outcome in zip(names, outcomes, strict=True):
            if name in cancelled:
                assert isinstance(outcome, asyncio.CancelledError)
            else:
                assert isinstance(outcome, InferResponse)
                assert outcome.result_json == name
        assert echo.ran == Counter(names)
        assert echo.cancelled == Counter(cancelled)

    asyncio.run(run())


FRAMES = st.lists(st.tuples(st.integers(1, 255), st.one_of(st.binary(max_size=40), st.binary(min_size=4000))))


def resume(reader: frames.FrameReader) -> None:
    while not reader.reads:
        reader.reads = True
        reader.feed(b"")


@given(FRAMES, st.booleans(), st.data())
def test_frames_are_the_same_however_they_arrive(
    sent: list[tuple[int, bytes]], into_space: bool, data: st.DataObject
) -> None:
    taken: list[tuple[int, bytes]] = []

    def take(kind: int, part: link.Buffer, start: int, end: int) -> None:
        taken.append((kind, bytes(part[start:end])))
        reader.reads = data.draw(st.booleans())

    reader = frames.FrameReader(take)
    stream = b"".join(link.frame(kind, payload) for kind, payload in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        arrived = stream[start:end]
        # A connection reads into the reader's own space, as much as there is.
        while into_space and arrived:
            space = reader.space()
            count = min(len(arrived), len(space))
            space[:count] = arrived[:count]
            arrived = arrived[count:]
            if (rest := reader.filled(count)) is not None:
                reader.feed(rest)
            resume(reader)
        reader.feed(arrived)
        resume(reader)
    assert taken == sent
    assert reader.partial_bytes == 0


async def test_call_cancelled_before_it_is_sent_never_runs() -> None:
    echo = Echo()
    async with serving(echo) as (_, connection, _):
        ask(connection, "cancelled").cancel()
        await ask(connection, "next")
        assert echo.ran == {"next": 1}


async def test_deadline_cancels_the_call_at_the_instance() -> None:
    echo = Echo(forever)
    timeout_s = 0.05
    async with serving(echo) as (_, connection, _):
        # On a busy machine a deadline may pass before the call has begun.
        while not echo.ran:
            with pytest.raises(TimeoutError):
                await ask(connection, "slow", timeout_s)
            timeout_s *= 2
        await echo.until(lambda: echo.cancelled == echo.ran)


async def test_each_call_has_its_own_deadline() -> None:
    echo = Echo(forever)
    async with serving(echo) as (_, connection, _):
        late = ask(connection, "late")
        soon = [ask(connection, str(n), 0.02 + n / 10_000) for n in range(200)]
        outcomes = await asyncio.gather(*soon, return_exceptions=True)
        assert [type(each) for each in outcomes] == [TimeoutError] * 200
        assert not late.done()


async def test_broken_link_fails_its_calls_and_is_opened_again() -> None:
    echo = Echo(forever)
    async with serving(echo) as (server, connection, port):
        lost = ask(connection, "lost")
        await echo.until(lambda: echo.ran.total() == 1)
        await server.stop()
        with pytest.raises(TransportError) as caught:
            await lost
        assert caught.value.reached
        with pytest.raises(TransportError) as caught:
            await ask(connection, "refused")
        assert not caught.value.reached
        await echo.until(lambda: echo.cancelled == {"lost": 1})
        async with serving(Echo(), port):
            assert (await ask_until_up(connection, "back")).result_json == "back"


async def test_closed_connection_cancels_all_its_calls_at_the_instance() -> None:
    echo = Echo(forever)
    async with serving(echo) as (_, connection, _):
        answers = [ask(connection, str(n)) for n in range(5)]
        await echo.until(lambda: echo.ran.total() == 5)
        await connection.close()
        failed = await asyncio.gather(*answers, return_exceptions=True)
        assert all(isinstance(each, TransportError) for each in failed)
        await echo.until(lambda: echo.cancelled.total() == 5)
        # A call on a closed connection must fail at once, not wait until its deadline.
        with pytest.raises(TransportError, match="closed"):
            await ask(connection, "late")


async def test_large_calls_arrive_whole() -> None:
    echo = Echo()
    async with serving(echo) as (_, connection, _):
        big = "x" * (3 << 20)
        requests = [InferRequest(params_json=big + str(n)) for n in range(30)]
        answers = await asyncio.gather(*(calling.ask(connection, each, WAIT_S) for each in requests))
    assert [answer.result_json[-2:].strip("x") for answer in answers] == [str(n) for n in range(30)]


async def test_calls_of_one_link_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MOST_OPEN", 64)
    unblocked = asyncio.Event()
    echo = Echo(lambda _: unblocked.wait())
    async with serving(echo) as (_, connection, _):
        answers = [ask(connection, str(n)) for n in range(200)]
        await echo.until(lambda: echo.ran.total() == 64)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert echo.ran.total() == 64
        unblocked.set()
        assert [each.result_json for each in await asyncio.gather(*answers)] == [str(n) for n in range(200)]


async def test_another_instance_at_the_address_is_never_asked() -> None:
    echo = Echo()
    server = ScriptedInstance(echo.infer, name="new")
    instance = await server.start()
    old = msgspec.structs.replace(instance, id="old")
    connection = EvaluatorConnection(old, connect_timeout_s=WAIT_S)
    try:
        with pytest.raises(TransportError, match="this is instance 'new' of app 'a', not 'old'") as caught:
            await ask(connection, "x")
        assert not caught.value.reached
        assert not echo.ran
    finally:
        await connection.close()
        await server.stop()


@pytest.mark.parametrize(("wanted", "own", "asks"), [("a", "b", False), ("a", "a", True), ("", "a", True)])
async def test_an_instance_with_other_content_is_never_asked(wanted: str, own: str, asks: bool) -> None:
    echo = Echo()
    server = ScriptedInstance(echo.infer)
    instance = await server.start()
    server.links.serve(msgspec.structs.replace(instance, digest=own * 64), server)
    connection = EvaluatorConnection(msgspec.structs.replace(instance, digest=wanted * 64), WAIT_S)
    try:
        if asks:
            assert (await ask(connection, "x")).result_json
        else:
            with pytest.raises(TransportError, match="'i' of app 'a' 'v', with other content than wanted"):
                await ask(connection, "x")
        assert bool(echo.ran) == asks
    finally:
        await connection.close()
        await server.stop()


async def test_instance_that_still_loads_refuses_gates() -> None:
    links = LinkServer(HeldBytes(1 << 30))
    server = await asyncio.get_running_loop().create_server(links.connect, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    instance = Instance(app="a", version="v", id="i", address=address, capacity=1)
    connection = EvaluatorConnection(instance, connect_timeout_s=WAIT_S)
    with pytest.raises(TransportError, match="still being loaded"):
        await ask(connection, "x")
    await connection.close()
    server.close()


GREETING = link.PREFACE + link.frame(link.HELLO, Hello(app="a", version="v", instance="i").SerializeToString())
ONE = link.call_head(1, 0, 0, b"", b"", 0)


async def disconnected(reader: asyncio.StreamReader) -> None:
    """Return once the other end has disconnected."""
    with suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(1000), WAIT_S):
            pass


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        link.MAGIC + b"\xff",
        link.PREFACE + ONE,
        link.PREFACE + link.frame(link.HELLO, b"\xff"),
        link.PREFACE + link.HEAD.pack(5000, link.HELLO),
        GREETING + link.HEAD.pack(frames.MAX_BYTES + 1, link.CALL),
        GREETING + link.frame(99),
        GREETING + link.away_frame(True),
        GREETING + link.frame(link.CALL, b"short"),
        GREETING + link.frame(link.CALL, link.CALL_HEAD.pack(1, 0, 0, 9, 9)),
        GREETING + link.frame(link.CANCEL, b"123"),
        GREETING + ONE + ONE,
    ],
)
async def test_peer_that_sends_rubbish_is_disconnected(sent: bytes) -> None:
    echo = Echo(forever)
    async with serving(echo) as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await disconnected(reader)
        writer.close()
        await echo.until(lambda: echo.cancelled == echo.ran)


# Field 99 of a Hello, which no build knows yet.
NEWER = link.PREFACE + link.frame(
    link.HELLO, Hello(app="a", version="v", instance="i").SerializeToString() + b"\x98\x06\x01"
)
OTHER = link.MAGIC + bytes([link.PROTOCOL - 1])


async def test_instance_serves_a_gate_whose_hello_has_a_field_more() -> None:
    async with serving(Echo()) as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(NEWER + ONE)
        assert await reader.readexactly(len(GREETING)) == GREETING
        assert (await asyncio.wait_for(reader.readexactly(link.HEAD.size), WAIT_S))[-1] == link.REPLY
        writer.close()


async def test_gate_asks_an_instance_whose_hello_has_a_field_more() -> None:
    response = InferResponse(result_json="1").SerializeToString()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(NEWER)
        await reader.readuntil(b"question")
        writer.write(link.reply_head(1, link.RESULT, 0, 0, 0, 0, 1, 1, len(response)) + response)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connection = EvaluatorConnection(Instance(app="a", version="v", id="i", address=address, capacity=1), WAIT_S)
    assert (await ask(connection, "question")).result_json == "1"
    await connection.close()
    server.close()


async def test_instance_leaves_a_gate_of_another_version_and_both_can_say_why() -> None:
    async with serving(Echo()) as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with capture_logs() as logs:
            writer.write(OTHER + link.frame(link.HELLO, b"x" * 1000))
            # No reset, which could take the preface away from the gate.
            assert await asyncio.wait_for(reader.read(), WAIT_S) == link.PREFACE
        writer.close()
    (logged,) = logs
    assert logged["event"] == "link broken"
    assert logged["reason"] == "the peer speaks version 1 of the link, this end version 2"


@pytest.mark.parametrize(
    ("rubbish", "reason"), [(link.frame(99), "a frame of kind 99"), (link.frame(link.AWAY), "an AWAY is empty")]
)
async def test_peer_that_sends_rubbish_to_a_gate_fails_its_calls(rubbish: bytes, reason: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readuntil(b"question")
        writer.write(rubbish)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connection = EvaluatorConnection(Instance(app="a", version="v", id="i", address=address, capacity=1), WAIT_S)
    with pytest.raises(TransportError, match=f"malformed: {reason}") as caught:
        await ask(connection, "question")
    assert caught.value.reached
    await connection.close()
    server.close()


async def test_instance_reads_no_more_from_a_gate_that_reads_no_replies() -> None:
    big = "x" * (1 << 20)
    echo = Echo()
    async with serving(echo) as (_, _, port):
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(peer, GREETING)
            request = InferRequest(params_json=big).SerializeToString()
            sent = 0
            with suppress(TimeoutError):
                for id_ in range(1, 1000):
                    call = link.call_head(id_, 0, 0, b"", b"", len(request)) + request
                    await asyncio.wait_for(loop.sock_sendall(peer, call), 1)
                    sent += 1
            # What the sockets' buffers hold, and a little more.
            assert sent < 200


async def test_silent_peer_is_dropped_by_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "ALIVE_S", 0.05)
    echo = Echo(forever)
    async with serving(echo) as (_, _, port):
        # A gate that has frozen.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GREETING + ONE)
        await disconnected(reader)
        await echo.until(lambda: echo.cancelled.total() == 1)
        writer.close()

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connection = EvaluatorConnection(Instance(app="a", version="v", id="i", address=address, capacity=1), WAIT_S)
    with pytest.raises(TransportError, match="the instance does not answer"):
        await ask(connection, "x")
    await connection.close()
    server.close()


async def test_idle_link_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "ALIVE_S", 0.05)
    echo = Echo()
    async with serving(echo) as (server, connection, _):
        await ask(connection, "x")
        (first,) = server.links.links
        await asyncio.sleep(0.5)
        assert server.links.links == {first}
        assert (await ask(connection, "y")).result_json == "y"


async def test_a_peer_that_does_not_say_who_it_is_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(Echo()) as (_, connection, port):
        # This gate has said it, with time enough.
        await ask(connection, "x")
        monkeypatch.setattr(link, "_HELLO_S", 0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(link.PREFACE + link.frame(link.ALIVE))
        await disconnected(reader)
        writer.close()
        await ask(connection, "y")


async def test_a_frame_takes_memory_only_as_it_arrives() -> None:
    before_mb = resident_mb()
    readers = [frames.FrameReader(lambda *_: None) for _ in range(20)]
    for reader in readers:
        reader.feed(link.HEAD.pack(frames.MAX_BYTES, link.CALL) + bytes(frames.START_BYTES))
        assert len(reader.space()) == frames.MAX_BYTES - frames.START_BYTES
    assert resident_mb() < before_mb + 100


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def test_a_call_with_the_longest_timeout_is_answered_beside_others() -> None:
    async with serving(Echo()) as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = InferRequest(params_json="x").SerializeToString()
        writer.write(GREETING + link.call_head(1, (1 << 64) - 1, 0, b"", b"", len(request)) + request)
        replies: list[link.Reply] = []

        def take(kind: int, data: link.Buffer, start: int, end: int) -> None:
            if kind == link.REPLY:
                replies.append(link.read_reply(data, start, end))

        frame_reader = frames.FrameReader(take)
        assert await reader.readexactly(len(link.PREFACE)) == link.PREFACE
        while not replies:
            frame_reader.feed(await asyncio.wait_for(reader.read(1000), WAIT_S))
        assert replies[0].id == 1
        writer.close()
    data = link.call_head(1, (1 << 64) - 1, 0, b"", b"", 0)
    assert link.read_call(data, link.HEAD.size, len(data)).timeout_us == link.MAX_TIMEOUT_US


async def test_calls_that_are_abandoned_before_they_leave_keep_no_bodies() -> None:
    connection = EvaluatorConnection(Instance(app="a", version="v", id="i", address="192.0.2.1:1", capacity=1), WAIT_S)
    answers = [ask(connection, "x" * 1000) for _ in range(20)]
    for answer in answers:
        answer.cancel()
    assert all(not each.parts for each in connection._outbox)
    await connection.close()
