"""Sets of hosts by patterns.

``example.com``; ``*.example.com``, the names below it; ``*``, all hosts; ``10.1.2.3``; ``10.0.0.0/8``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ALL = "*"

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:\*\.)?(?:{_LABEL}\.)*{_LABEL}")
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


def normal(host: str) -> str:
    """Return the name of a host in one notation: in small letters, without the root's dot."""
    return host.lower().rstrip(".")


def address_of(host: str) -> Address | None:
    """Return the address that a host is; None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def ends_in_number(host: str) -> bool:
    """Return whether a name may be an odd notation of an address, such as ``0x7f.1`` or ``2130706433``."""
    return _NUMBER.fullmatch(host) is not None


def parse(pattern: str) -> str | Network:
    """Return the name or network of a pattern, which is not ALL. Raises ValueError."""
    if "/" in pattern or address_of(pattern):
        return ipaddress.ip_network(pattern)
    name = pattern.lower()
    if len(name) > 253 or not _NAME.fullmatch(name) or ends_in_number(name):
        raise ValueError(f"{pattern[:80]!r} should be a name such as *.example.com, in ASCII, an address or a network")
    return name


class Hosts:
    """A set of hosts."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises ValueError for a wrong pattern."""
        self.patterns = frozenset(patterns)
        parsed = [parse(each) for each in self.patterns if each != ALL]
        self.has_all = ALL in self.patterns
        self.names = frozenset(each for each in parsed if isinstance(each, str))
        self.networks = tuple(each for each in parsed if not isinstance(each, str))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hosts) and self.patterns == other.patterns

    def __hash__(self) -> int:
        return hash(self.patterns)

    def has_name(self, name: str) -> bool:
        """Return whether a normal name is one of them, whatever its addresses."""
        if self.has_all or name in self.names:
            return True
        parents = name.split(".")[1:]
        return any(f"*.{'.'.join(parents[at:])}" in self.names for at in range(len(parents)))

    def has_address(self, address: Address) -> bool:
        """Return whether an address is one of them, or in one of their networks."""
        return self.has_all or any(address in network for network in self.networks)
