"""The proxy through which an evaluator fetches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from atserving import hosts
from atserving.errors import StartError
from atserving.hosts import Hosts


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy: it gets requests for http URLs, and opens tunnels (CONNECT) for https."""

    url: str
    """``http://host:port``"""
    credentials: str = field(default="", repr=False)
    """``user:password``"""
    direct: Hosts = field(default_factory=lambda: Hosts([]))
    """The hosts to connect to without it, by what URLs call them."""

    def serves(self, host: str) -> bool:
        """Return whether to fetch from a host through the proxy."""
        address = hosts.address_of(host)
        return not (self.direct.has_address(address) if address else self.direct.has_name(hosts.normal(host)))


def checked_url(text: str) -> str:
    """Return the URL of a proxy. Raises ValueError, whose message holds no credentials."""
    parts = urlsplit(text)
    if parts.username is not None or parts.password is not None:
        raise ValueError("should have no credentials, which everybody sees in the process list: see --proxy-auth")
    if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/") or parts.query:
        raise ValueError("should be http://host:port")
    return f"http://{parts.netloc}"


def read_proxy(url: str, auth: Path | None, direct: Sequence[str]) -> Proxy:
    """Return the proxy of the flags. Raises StartError if the file of its credentials is wrong."""
    credentials = ""
    if auth:
        try:
            credentials = auth.read_text("ascii").strip()
        except OSError as error:
            raise StartError(f"--proxy-auth {auth}: can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise StartError(f"--proxy-auth {auth}: is not ASCII text") from None
        user, colon, _ = credentials.partition(":")
        if not user or not colon or not credentials.isprintable():
            raise StartError(f"--proxy-auth {auth}: should be one line, user:password")
    return Proxy(url, credentials, Hosts(direct))
