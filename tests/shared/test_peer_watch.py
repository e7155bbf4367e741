"""A caller that is frozen gives up what the server does and holds for it; one that is alive keeps it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from atserving import peer_watch
from atserving.transport import channel
from reliability.frames import DATA, PREFACE, SETTINGS, frame
from tests.processes import Process
from tests.shared.scripted_server import WAIT_S, Scripted, method, request, running
from tests.waiting import until


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_watch, "_TURN_S", 0.1)
    monkeypatch.setattr(peer_watch, "_UNREAD_S", 1)


@contextmanager
def caller(scripted: Scripted, path: str, body: str) -> Iterator[Process]:
    process = Process([sys.executable, "-m", "tests.shared.frozen", f"127.0.0.1:{scripted.port}", path, body])
    process.start()
    try:
        yield process
    finally:
        process.kill()


async def test_the_call_of_a_frozen_caller_is_cancelled() -> None:
    async with running() as scripted:
        with caller(scripted, "/test/Wait", "x" * 100_000) as frozen:
            await scripted.all_waiting(1)
            assert scripted.held.held
            frozen.freeze()
            await scripted.all_gone(1)
            assert not scripted.held.held
            assert not scripted.server._connections


async def test_a_frozen_caller_gives_up_an_answer_that_it_has_not_read() -> None:
    async with running() as scripted:
        with caller(scripted, "/test/Wait", "") as frozen:
            await scripted.all_waiting(1)
            frozen.freeze()
            scripted.waiting[0].finish(bytes(32 << 20))
            assert scripted.held.held
            await until(lambda: not scripted.server._connections, what="the connection has ended")
            assert not scripted.held.held


async def silent_caller(scripted: Scripted) -> asyncio.StreamWriter:
    """Send a request, and nothing more."""
    _, writer = await asyncio.open_connection("127.0.0.1", scripted.port)
    body = frame(DATA, 1, 1, b"\0\0\0\0\0")
    writer.write(PREFACE + frame(SETTINGS, 0, 0) + request(b"/test/Wait", 1) + body)
    return writer


async def test_a_caller_that_answers_pings_keeps_its_call() -> None:
    async with running() as scripted, channel(f"127.0.0.1:{scripted.port}") as client:
        answer = asyncio.ensure_future(method(client, "/test/Wait")(b"", timeout=WAIT_S))
        await scripted.all_waiting(1)
        # In the time that it takes to leave a silent one, the other has answered as many pings.
        for left in (1, 2, 3):
            silent = await silent_caller(scripted)
            await scripted.all_gone(left)
            silent.close()
        scripted.waiting[0].finish(b"done")
        assert await answer == b"done"


async def test_a_silent_caller_without_a_call_is_left_alone() -> None:
    async with running() as scripted:
        _, idle = await asyncio.open_connection("127.0.0.1", scripted.port)
        idle.write(PREFACE + frame(SETTINGS, 0, 0))
        await until(lambda: scripted.server._connections, what="it is connected")
        kept = set(scripted.server._connections)
        silent = await silent_caller(scripted)
        await scripted.all_gone(1)
        assert scripted.server._connections == kept
        idle.close()
        silent.close()
