"""The names of Services, as a cluster's DNS server tells them: who is ready, as it was up to 30 seconds ago."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.name_server import Answer, NameServer

TTL_S = 30
"""How long CoreDNS says that its answers hold. A cache on the node takes it at its word, and so does this one."""

NEGATIVE_TTL_S = 5


class Names:
    """A DNS server on any free port, for who asks one, and a hosts file, for who asks the system.

    ``addresses`` says which addresses a name stands for just now.
    """

    def __init__(self, address: str, hosts: Path, addresses: Callable[[str], list[str]]) -> None:
        self.address, self.hosts = address, hosts
        self._addresses = addresses
        self._known: dict[str, tuple[float, list[str]]] = {}
        self._lock = threading.Lock()
        self._server = NameServer(lambda name, _: Answer(*self.lookup(name)), address)
        self.port = self._server.port

    def lookup(self, name: str) -> tuple[list[str], float]:
        """The addresses of a name, or those it had while that was to be remembered, and for how long that is."""
        with self._lock:
            valid_until, found = self._known.get(name, (0.0, []))
            now = time.monotonic()
            if valid_until <= now:
                found = self._addresses(name)
                valid_until = now + (TTL_S if found else NEGATIVE_TTL_S)
                self._known[name] = (valid_until, found)
        return found, valid_until - now

    def write_hosts(self, names: list[str]) -> None:
        """Brings the hosts file up to date, in place, as it is mounted."""
        lines = [f"{address} {name}\n" for name in names for address in self.lookup(name)[0]]
        self.hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def stop(self) -> None:
        self._server.stop()
