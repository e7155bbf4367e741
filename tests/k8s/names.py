"""A cluster's DNS: the addresses of the pods behind a Service, as old as a cache may have them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.name_server import Answer, NameServer

CLUSTER_TTL_S = 30
"""How long CoreDNS lets a cache keep its answers."""
TTL_S = 5
"""How long the stand-in keeps them: as long as it may without making each rollout half a minute longer."""
NEGATIVE_TTL_S = 1


class Names:
    """A DNS server on a free port, for programs that ask one, and a hosts file, for programs that ask the system.

    ``addresses`` returns the current addresses of a name.
    """

    def __init__(self, address: str, hosts: Path, addresses: Callable[[str], list[str]]) -> None:
        self.address, self.hosts = address, hosts
        self._addresses = addresses
        self._known: dict[str, tuple[float, list[str]]] = {}
        self._lock = threading.Lock()
        self._server = NameServer(lambda name, _: Answer(*self.lookup(name)), address)
        self.port = self._server.port

    def lookup(self, name: str) -> tuple[list[str], float]:
        """Return the addresses of a name, cached ones while they are valid, and the seconds for which they are."""
        with self._lock:
            valid_until, found = self._known.get(name, (0.0, []))
            now = time.monotonic()
            if valid_until <= now:
                found = self._addresses(name)
                valid_until = now + (TTL_S if found else NEGATIVE_TTL_S)
                self._known[name] = (valid_until, found)
        return found, valid_until - now

    def write_hosts(self, names: list[str]) -> None:
        """Write the hosts file. It is written in place, as it is mounted into pods."""
        lines = [f"{address} {name}\n" for name in names for address in self.lookup(name)[0]]
        self.hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def stop(self) -> None:
        self._server.stop()
