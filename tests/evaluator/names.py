"""A name server (RFC 1035) of the tests' own, whose answers they choose."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp.resolver import AsyncResolver

_A, _NAME_ERROR = 1, 3


class NameServer(asyncio.DatagramProtocol):
    """Answers from ``addresses``: by name, the IPv4 addresses to give each time it is asked for, the last for ever.

    A name that is not there is unknown; of one that has nothing, nothing is ever said.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, list[list[str]]] = {}
        self.asked: Counter[str] = Counter()
        """How often each name was asked for an IPv4 address."""
        self.port = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        name, end = self._name(data)
        (kind,) = struct.unpack_from("!H", data, end)
        known = self.addresses.get(name)
        if known == []:
            return
        found = []
        if kind == _A:
            turn = self.asked[name]
            self.asked[name] += 1
            found = known[min(turn, len(known) - 1)] if known else []
        code = 0 if known else _NAME_ERROR
        header = data[:2] + struct.pack("!5H", 0x8180 | code, 1, len(found), 0, 0)
        answers = [struct.pack("!3HIH", 0xC00C, _A, 1, 0, 4) + socket.inet_aton(each) for each in found]
        self._transport.sendto(header + data[12 : end + 4] + b"".join(answers), addr)

    @staticmethod
    def _name(data: bytes) -> tuple[str, int]:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += 1 + data[at]
        return ".".join(labels).lower(), at + 1

    def resolver(self) -> AsyncResolver:
        """What the evaluator resolves with, but asking this server alone."""
        return AsyncResolver(nameservers=[f"127.0.0.1:{self.port}"])


@asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        NameServer, local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()
