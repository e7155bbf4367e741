"""A DNS server for tests, which choose its answers."""

from __future__ import annotations

import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import dnslib
from aiohttp.resolver import AsyncResolver


@dataclass(frozen=True)
class Answer:
    """The IPv4 addresses of a name. Without any, the name does not exist."""

    addresses: Sequence[str]
    ttl_s: float = 0.0


Lookup = Callable[[str, bool], Answer | None]
"""Returns the answer for a name in small letters, or None to send no reply. The flag: is the question for IPv4?"""


class NameServer:
    """A DNS server over UDP on a free port of ``address``. A thread of its own calls ``lookup``."""

    def __init__(self, lookup: Lookup, address: str = "127.0.0.1") -> None:
        self._lookup = lookup
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="name-server", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, client = self._socket.recvfrom(4096)
            if not data:
                return
            reply = self._reply(data)
            if reply:
                self._socket.sendto(reply, client)

    def _reply(self, data: bytes) -> bytes | None:
        try:
            request = dnslib.DNSRecord.parse(data)
        except dnslib.DNSError:
            return None
        wants_ipv4 = request.q.qtype == dnslib.QTYPE.A
        answer = self._lookup(str(request.q.qname).rstrip(".").lower(), wants_ipv4)
        if answer is None:
            return None
        reply = request.reply()
        if not answer.addresses:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        elif wants_ipv4:
            for each in answer.addresses:
                reply.add_answer(dnslib.RR(request.q.qname, rdata=dnslib.A(each), ttl=math.ceil(answer.ttl_s)))
        return bytes(reply.pack())

    def stop(self) -> None:
        # An empty datagram ends the thread.
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


class ScriptedNames:
    """Names whose answers a test sets.

    ``addresses`` holds a list for each name: its addresses at the first question, at the second, and so on; the last
    entry repeats. An empty list: the server stays silent. A missing name does not exist.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, list[list[str]]] = {}
        self.asked: Counter[str] = Counter()
        """Questions for IPv4 addresses, by name."""
        self.server = NameServer(self._answer)

    def _answer(self, name: str, wants_ipv4: bool) -> Answer | None:
        turns = self.addresses.get(name)
        if turns is None:
            return Answer([])
        if not turns:
            return None
        turn = self.asked[name]
        self.asked[name] += wants_ipv4
        return Answer(turns[min(turn, len(turns) - 1)])

    def resolver(self) -> AsyncResolver:
        """A resolver of the evaluator's kind that asks this server alone."""
        return AsyncResolver(nameservers=[f"127.0.0.1:{self.server.port}"])


@contextmanager
def scripted_names() -> Iterator[ScriptedNames]:
    names = ScriptedNames()
    try:
        yield names
    finally:
        names.server.stop()
