"""The names of Services, as a cluster's DNS server tells them: who is ready, as it was up to 30 seconds ago."""

from __future__ import annotations

import time
from collections.abc import Callable

import dnslib
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

TTL_S = 30
"""How long CoreDNS says that its answers hold. A cache on the node takes it at its word, and so does this one."""

NEGATIVE_TTL_S = 5


class Names(BaseResolver):  # type: ignore[misc]
    """A DNS server on any free port; ``addresses`` says which addresses a name stands for just now."""

    def __init__(self, address: str, addresses: Callable[[str], list[str]]) -> None:
        self.address = address
        self._addresses = addresses
        self._known: dict[str, tuple[float, list[str]]] = {}
        self._server = DNSServer(self, address=address, port=0, logger=DNSLogger("error"))
        self.port = int(self._server.server.server_address[1])
        self._server.start_thread()

    def resolve(self, request: dnslib.DNSRecord, handler: DNSHandler) -> dnslib.DNSRecord:
        name = str(request.q.qname).rstrip(".")
        valid_until, found = self._known.get(name, (0.0, []))
        if valid_until <= time.monotonic():
            found = self._addresses(name)
            self._known[name] = (time.monotonic() + (TTL_S if found else NEGATIVE_TTL_S), found)
        reply = request.reply()
        if not found:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        elif request.q.qtype == dnslib.QTYPE.A:
            for each in found:
                reply.add_answer(dnslib.RR(request.q.qname, rdata=dnslib.A(each), ttl=TTL_S))
        return reply

    def stop(self) -> None:
        self._server.stop()
        self._server.server.server_close()
