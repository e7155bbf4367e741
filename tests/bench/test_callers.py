"""The load generator counts right, refused and wrong answers, and gives up on a server that breaks a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench import callers
from bench.answer import Answer

SEVEN = Answer(7, 0.95)
RIGHT = b'{"code":0,"result":{"confidences":[{"index":7,"class":"seven","score":0.9500001}]}}'


@pytest.mark.parametrize(
    ("body", "right"),
    [
        (RIGHT, True),
        (b'{"index":7,"score":9.5e-1}', True),
        (b'{"index": 7, "score": 0.95}', True),
        (b'{"index":8,"score":0.95}', False),
        (b'{"index":7,"score":0.94}', False),
        (b"[" + RIGHT + b"," + RIGHT + b"]", False),
        (b"", False),
    ],
)
def test_an_answer_is_right_by_its_class_and_score(body: bytes, right: bool) -> None:
    assert SEVEN.is_in(body) == right


def test_a_batch_has_as_many_answers_as_tasks() -> None:
    assert Answer(7, 0.95, count=2).is_in(b"[" + RIGHT + b"," + RIGHT + b"]")
    assert not Answer(7, 0.95, count=2).is_in(b"[" + RIGHT + b',{"code":429}]')


@asynccontextmanager
async def answering(answer: Callable[[int], bytes]) -> AsyncIterator[str]:
    """A server that gives the answer of a request's number, and closes the connection on an empty one."""
    numbers = iter(range(1_000_000))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            assert b"content-length: 2\r\n" in head
            await reader.readexactly(2)
            response = answer(next(numbers))
            if not response:
                writer.close()
                return
            writer.write(response)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


def response(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


def load(url: str) -> callers.Load:
    with callers.Running(callers.Job(url, b"xy", 2, 0.05, 0.0, answer=SEVEN)) as running:
        running.begun()
        return running.ended()


async def test_refused_and_wrong_answers_are_counted() -> None:
    right = response(200, RIGHT)
    kinds = [right, response(200, b'{"index":8,"score":0.95}'), response(429, b"")]
    async with answering(lambda number: kinds[number % 3] if number < 300 else right) as url:
        seen = await asyncio.to_thread(load, url)
    assert min(seen.right, seen.refused, seen.wrong) > 0
    assert seen.answers == seen.right + seen.refused + seen.wrong


async def test_a_broken_connection_is_no_measurement() -> None:
    async with answering(lambda number: b"" if number > 5 else response(200, RIGHT)) as url:
        with pytest.raises(OSError, match="ended early"):
            await asyncio.to_thread(load, url)
