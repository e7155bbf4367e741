"""Tell requests of this machine's programs from those of web pages.

A web page may send a browser to a loopback port under a host name of its own (DNS rebinding). The browser then lets the
page read the answers. Only the name in the Host header tells such a request from others.
"""

from __future__ import annotations

import re

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""The names of this machine by which a server on a loopback address may be called."""

_HOST = re.compile(rf"(?:{'|'.join(map(re.escape, HOSTS))})(?::[0-9]*)?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Return whether a Host header, with or without a port, names a loopback address."""
    return bool(_HOST.fullmatch(host))
