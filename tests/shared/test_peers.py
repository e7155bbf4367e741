"""Lookups of DNS names: all addresses of a name, outages of the DNS server, lookups that hang."""

from __future__ import annotations

import socket
import threading

import pytest

from atserving.peers import Peers

TIMEOUT_S = 0.05


class DnsServer:
    """Answers the lookups of this process. While ``hosts`` is None, lookups hang."""

    def __init__(self) -> None:
        self.hosts: dict[str, list[str]] | None = {}
        self.lookups = 0
        self.answering = threading.Event()

    def getaddrinfo(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        self.lookups += 1
        if self.hosts is None:
            self.answering.wait()
        if self.hosts is None or host not in self.hosts:
            raise OSError("unknown name")
        return [(None, None, None, "", (each, port)) for each in self.hosts[host]]


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> DnsServer:
    server = DnsServer()
    monkeypatch.setattr(socket, "getaddrinfo", server.getaddrinfo)
    return server


KNOWN = ["10.0.0.1:50053", "10.0.0.2:50053", "[fd00::1]:50053"]


async def resolved(dns: DnsServer, addresses: Peers) -> list[str]:
    dns.hosts = {"registry": ["10.0.0.1", "10.0.0.2", "fd00::1"]}
    return sorted(await addresses.resolve())


async def test_a_name_stands_for_itself_until_its_first_lookup_succeeds(dns: DnsServer) -> None:
    assert await Peers(["registry:50053", "10.0.0.9:1"]).resolve() == ["registry:50053", "10.0.0.9:1"]


async def test_a_name_stands_for_all_its_addresses(dns: DnsServer) -> None:
    assert await resolved(dns, Peers(["registry:50053"])) == KNOWN


async def test_a_failed_lookup_keeps_the_last_addresses(dns: DnsServer) -> None:
    addresses = Peers(["registry:50053"])
    await resolved(dns, addresses)
    dns.hosts = {}
    assert sorted(await addresses.resolve()) == KNOWN


async def test_a_hanging_lookup_keeps_the_last_addresses_and_is_not_repeated(dns: DnsServer) -> None:
    addresses = Peers(["registry:50053"], TIMEOUT_S)
    # On a busy machine the first lookup may take longer than the timeout.
    while await resolved(dns, addresses) != KNOWN:
        pass
    dns.hosts, lookups = None, dns.lookups
    for _ in range(2):
        assert sorted(await addresses.resolve()) == KNOWN
    assert dns.lookups == lookups + 1
    dns.hosts = {"registry": ["10.0.0.3"]}
    dns.answering.set()
    # The lookup that hung has an answer now.
    while (found := await addresses.resolve()) != ["10.0.0.3:50053"]:
        assert sorted(found) == KNOWN
