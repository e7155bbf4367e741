"""The addresses of a service: DNS names, resolved again for every round of connections."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

RESOLVE_S = 2.0
"""The default timeout of one lookup, in seconds."""


class Peers:
    """A list of ``host:port``; each stands for all the addresses that DNS has for its host."""

    def __init__(self, addresses: Sequence[str], timeout_s: float = RESOLVE_S) -> None:
        # A name stands for itself until its first lookup succeeds.
        self._known = {address: [address] for address in addresses}
        self._lookups: dict[str, asyncio.Future[list[str]]] = {}
        self._timeout_s = timeout_s

    async def resolve(self) -> list[str]:
        """Look up every name and return all addresses, in random order within one name to spread the load.

        A failed lookup keeps the addresses of the last one, so that an outage of DNS stops nobody.
        """
        for address in self._known:
            # One lookup at a time: if the DNS server is silent, each takes the full time.
            lookup = self._lookups.get(address) or _lookup(address)
            self._lookups[address] = lookup
            await asyncio.wait({lookup}, timeout=self._timeout_s)
            if lookup.done():
                del self._lookups[address]
                self._known[address] = lookup.result() or self._known[address]
            random.shuffle(self._known[address])
        return [each for known in self._known.values() for each in known]


def _lookup(address: str) -> asyncio.Future[list[str]]:
    """Look up a name in a daemon thread; the result is empty if the lookup failed.

    The event loop's own lookup threads would keep the process alive until a hanging lookup returns.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[str]] = loop.create_future()

    def look_up() -> None:
        host, _, port = address.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        hosts = list(dict.fromkeys(str(target[0]) for *_, target in found))
        # The loop may have closed in the meantime.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(
                future.set_result, [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]
            )

    threading.Thread(target=look_up, name="lookup", daemon=True).start()
    return future
