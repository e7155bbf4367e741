"""A proxy between gate and instance that passes bytes on at a low rate, over real sockets with small buffers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

_STEP_BYTES, _STEP_S = 16 << 10, 1 / 64
RATE = _STEP_BYTES / _STEP_S
"""Bytes per second in each direction, at most."""


class SlowLink:
    """A proxy before one instance."""

    def __init__(self) -> None:
        self.address = ""
        self.passed = 0
        """How many bytes it has passed on to the instance."""
        self.passed_back = 0
        """How many bytes it has passed on to the gate."""
        self.reads = asyncio.Event()
        """While this is not set, it reads nothing from the gate."""
        self.reads.set()


@asynccontextmanager
async def slow_link(address: str) -> AsyncIterator[SlowLink]:
    """Run a proxy to an instance's address."""
    link = SlowLink()
    host, _, port = address.rpartition(":")
    tasks = set[asyncio.Task[None]]()

    async def pass_on(gate: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with gate, socket.socket() as instance, suppress(ConnectionError):
            instance.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * _STEP_BYTES)
            instance.setblocking(False)
            await loop.sock_connect(instance, (host, int(port)))
            back = asyncio.create_task(_back(instance, gate, link))
            try:
                while data := await loop.sock_recv(gate, _STEP_BYTES):
                    await loop.sock_sendall(instance, data)
                    link.passed += len(data)
                    await asyncio.sleep(len(data) / RATE)
                    await link.reads.wait()
            finally:
                back.cancel()

    async def accept() -> None:
        while True:
            gate, _ = await asyncio.get_running_loop().sock_accept(listener)
            gate.setblocking(False)
            tasks.add(asyncio.create_task(pass_on(gate)))

    async with AsyncExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        # Accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * _STEP_BYTES)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        link.address = f"127.0.0.1:{listener.getsockname()[1]}"
        tasks.add(asyncio.create_task(accept()))
        try:
            yield link
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _back(instance: socket.socket, gate: socket.socket, link: SlowLink) -> None:
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while data := await loop.sock_recv(instance, _STEP_BYTES):
            await loop.sock_sendall(gate, data)
            link.passed_back += len(data)
            await asyncio.sleep(len(data) / RATE)
