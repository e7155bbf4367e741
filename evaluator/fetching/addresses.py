"""Restricts downloads to public addresses, and to networks and ports that the operator allows.

A request must not reach internal services: those of this machine, of its network, or the metadata service of a cloud.
``AddressPolicy.socket`` checks the address of every connection, also after a redirect. The resolver in
``http_fetcher`` checks all addresses of a name before one of them is connected to.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from atserving.hosts import Address, Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_REFUSED: tuple[Network, ...] = (
    ipaddress.IPv4Network("100.64.0.0/10"),  # carrier-grade NAT, RFC 6598
    ipaddress.IPv4Network("192.0.0.0/24"),  # IETF protocols and metadata services, RFC 6890
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's platform services; looks like a public address
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # local-use NAT64, RFC 8215
    ipaddress.IPv6Network("fec0::/10"),  # site-local, RFC 3879
)


_WITH_PORT = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]]+)):([0-9]{1,5})")


@dataclass(frozen=True)
class AllowedNetwork:
    """A network to allow although it is not public, on one port or on all of them."""

    network: Network
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> AllowedNetwork:
        """Parse an address or a network, perhaps with a port: ``10.0.0.0/8``, ``127.0.0.1:80``, ``[fd00::/8]:80``.

        Raises ValueError.
        """
        match = _WITH_PORT.fullmatch(text)
        if not match:
            return cls(ipaddress.ip_network(text))
        port = int(match[3])
        if not 0 < port < 1 << 16:
            raise ValueError(f"{text!r} has no port between 1 and 65535")
        return cls(ipaddress.ip_network(match[1] or match[2]), port)

    def has(self, address: Address, port: int) -> bool:
        """Whether this allows a connection to the address."""
        return self.port in (None, port) and address in self.network


class AddressRefused(Exception):  # noqa: N818
    """The policy refuses ``host``, a name or an address."""

    def __init__(self, host: str, reason: str = "is not a public address") -> None:
        super().__init__(f"{host!r} {reason}")
        self.host = host


class AddressPolicy:
    """Decides which addresses may be connected to."""

    def __init__(self, allowed: Sequence[AllowedNetwork] = ()) -> None:
        self._allowed = tuple(allowed)

    def allows(self, text: str, port: int) -> bool:
        """Whether an address is allowed on a port. If it embeds an IPv4 address, both must be allowed."""
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        return all(self._allows(each, port) for each in with_embedded(address))

    def socket(self, info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        """Create a socket for a connection to ``info``, an entry of getaddrinfo.

        Raises AddressRefused.
        """
        family, kind, protocol, _, address = info
        host = str(address[0])
        if not self.allows(host, int(address[1])):
            raise AddressRefused(host)
        return socket.socket(family, kind, protocol)

    def _allows(self, address: Address, port: int) -> bool:
        if any(each.has(address, port) for each in self._allowed):
            return True
        return (
            address.is_global
            and not (address.is_multicast or address.is_reserved or address.is_link_local or address.is_unspecified)
            and not any(address in network for network in _REFUSED)
        )


def with_embedded(address: Address) -> Iterator[Address]:
    """Yield the addresses that a packet to ``address`` may reach."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped:
        # Another notation of the IPv4 address.
        yield address.ipv4_mapped
        return
    if address in _NAT64:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return
    yield address
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo
