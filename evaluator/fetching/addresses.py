"""Which addresses resources may be fetched from: public ones, and the networks an operator allows.

A request must not reach what only this machine can reach: its own services, its network, a cloud's metadata service.
Every connection passes ``AddressPolicy.socket``, whatever led to it; ``PolicyResolver`` sees to names before that.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_REFUSED: tuple[Network, ...] = (
    ipaddress.IPv4Network("100.64.0.0/10"),  # carrier-grade NAT, RFC 6598
    ipaddress.IPv4Network("192.0.0.0/24"),  # of protocols and clouds' metadata, RFC 6890
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's platform, a public address in form only
    ipaddress.IPv6Network("64:ff9b:1::/48"),  # NAT64 of local use, RFC 8215
    ipaddress.IPv6Network("fec0::/10"),  # site-local, RFC 3879
)


class AddressRefused(Exception):  # noqa: N818
    """``host``, a name or an address, may not be connected to."""

    def __init__(self, host: str) -> None:
        super().__init__(f"{host!r} is not a public address")
        self.host = host


class AddressPolicy:
    """Says of an address whether it may be connected to."""

    def __init__(self, allowed: Sequence[Network] = ()) -> None:
        """``allowed``: networks that may be reached though they are not public."""
        self._allowed = tuple(allowed)

    def allows(self, text: str) -> bool:
        """Whether the address may be reached; of one that carries an IPv4 address, whether that may be too."""
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        return all(self._allows(each) for each in _with_embedded(address))

    def socket(self, info: AddrInfoType) -> socket.socket:
        """A socket that is about to be connected to ``info``; the ``socket_factory`` of aiohttp's connector.

        Raises AddressRefused.
        """
        family, kind, protocol, _, address = info
        host = str(address[0])
        if not self.allows(host):
            raise AddressRefused(host)
        return socket.socket(family, kind, protocol)

    def _allows(self, address: Address) -> bool:
        if any(address in network for network in self._allowed):
            return True
        return (
            address.is_global
            and not (address.is_multicast or address.is_reserved or address.is_link_local or address.is_unspecified)
            and not any(address in network for network in _REFUSED)
        )


def _with_embedded(address: Address) -> Iterator[Address]:
    """The addresses that a packet to ``address`` may end at."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped:
        # It is that IPv4 address in another notation.
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


class PolicyResolver(AbstractResolver):
    """Resolves names for aiohttp, which connects to just what this returns: nothing is resolved a second time.

    A name with an address that the policy refuses, be it one of several, raises AddressRefused.
    """

    def __init__(self, policy: AddressPolicy, resolver: AbstractResolver) -> None:
        self._policy = policy
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        if not all(self._policy.allows(result["host"]) for result in results):
            raise AddressRefused(host)
        return results

    async def close(self) -> None:
        await self._resolver.close()
