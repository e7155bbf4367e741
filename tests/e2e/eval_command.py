"""Run `atserving eval` as a caller does, on a mesh or on a server with scripted answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from atserving.local import examples
from atserving.local.mesh import Mesh
from tests.e2e.client import IMAGES

SEVEN, ONE = str(IMAGES / "7.png"), str(IMAGES / "1.png")
# The command of this checkout, whichever is installed.
COMMAND = """
from atserving.cli import service
from atserving.cli.eval import evaluate
service.run(evaluate, "atserving")
"""

Ended = subprocess.CompletedProcess[str]


def line_of(edge: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and its environment."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(examples.ROOT), "ATSERVING_EDGE": edge}
    return [sys.executable, "-c", COMMAND, *arguments], environment


async def evaluate(edge: Mesh | str, *arguments: str, stdin: bytes = b"", **variables: str) -> Ended:
    command, environment = line_of(edge if isinstance(edge, str) else edge.url, *arguments)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment | variables,
    )
    stdout, stderr = await process.communicate(stdin)
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, stdout.decode(), stderr.decode())


def rows(ended: Ended) -> list[list[str]]:
    assert (ended.returncode, ended.stderr) == (0, "")
    return [line.split() for line in ended.stdout.splitlines()]


def objects(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ended.stdout.splitlines()]


def failed(ended: Ended, status: int) -> str:
    """Return the one line of a failure."""
    assert ended.returncode == status, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("atserving: ")
    return line


@asynccontextmanager
async def server(answer: Callable[[int], Awaitable[bytes]]) -> AsyncIterator[str]:
    """Run a server of one request a connection, and yield its URL.

    ``answer`` takes the number of the connection and returns an awaitable of all bytes to send.
    """
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        number, count = count, count + 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length
        await reader.readexactly(int(length[1]))
        writer.write(await answer(number))
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def response(status: int, body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, b"content-length: %d" % len(body), b"connection: close", *headers]
    return b"\r\n".join([*lines, b"", body])
