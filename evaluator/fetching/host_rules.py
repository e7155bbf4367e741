"""The hosts that an app may fetch from, by its worker settings. They narrow what the address policy lets through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from atserving import hosts
from atserving.hosts import Hosts
from evaluator.fetching.addresses import AddressRefused, with_embedded


class HostRefused(AddressRefused):
    """The settings of the app do not let it fetch from ``host``."""

    def __init__(self, host: str) -> None:
        super().__init__(host, "is no host that this app may fetch from")


@dataclass(frozen=True)
class HostRules:
    """Allows a host whose name, or each of whose addresses, is in ``allow``, and neither is in ``deny``."""

    allow: Hosts = field(default_factory=lambda: Hosts([hosts.ALL]))
    deny: Hosts = field(default_factory=lambda: Hosts([]))

    def check(self, host: str, addresses: Iterable[str]) -> None:
        """Raise HostRefused unless an app may fetch from a host with these addresses. Without any, they are unknown."""
        literal = hosts.address_of(host)
        name = "" if literal else hosts.normal(host)
        found = [each for text in addresses if (address := hosts.address_of(text)) for each in with_embedded(address)]
        denied = self.deny.has_name(name) or any(map(self.deny.has_address, found))
        allowed = self.allow.has_name(name) or (found and all(map(self.allow.has_address, found)))
        if denied or not allowed or (self.deny.networks and not found):
            raise HostRefused(host)


ANY = HostRules()
