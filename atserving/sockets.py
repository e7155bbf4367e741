"""Sockets that services listen on."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket

from atserving.errors import StartError

_BACKLOG = 1024
_ANY = ("", "*", "[::]")
_ANY_IPV4 = "0.0.0.0"  # noqa: S104 - an operator asks for it


async def listening_socket(listen: str, *, insecure: bool = False) -> socket.socket:
    """Return a socket that listens on ``host:port``; port 0: any free port. Raises StartError.

    Without a host, and with ``[::]``, it listens on every IPv4 and IPv6 address. Unless ``insecure``, the address must
    be a loopback one: only this machine reaches those.
    """
    try:
        own = await asyncio.get_running_loop().run_in_executor(None, _socket, listen, insecure)
        # Its connections inherit it. asyncio's own loop, unlike uvloop, leaves it out for these.
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return own
    except (OSError, OverflowError) as error:
        raise StartError(f"cannot listen on {listen}: {refusal(error)}") from None


def refusal(error: OSError | OverflowError) -> str:
    """Return why a server cannot listen."""
    match error:
        case OSError(errno=errno.EADDRINUSE):
            return "the address is in use"
        case OSError(errno=errno.EADDRNOTAVAIL):
            return "the address is not this machine's"
        case OSError(errno=errno.EACCES):
            return "permission denied"
        case _:
            return str(error)


def is_loopback(listen: str) -> bool:
    """Return whether ``host:port`` is an address, or the name, of this machine alone. Other names may be anything."""
    host = listen.rpartition(":")[0]
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _socket(listen: str, insecure: bool) -> socket.socket:
    host, _, port = listen.rpartition(":")
    if host in _ANY:
        _check(listen, is_loopback=False, insecure=insecure)
        dual = socket.has_dualstack_ipv6()
        family, address = (socket.AF_INET6, ("::", int(port))) if dual else (socket.AF_INET, (_ANY_IPV4, int(port)))
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    try:
        # An address needs no lookup, which may hang.
        number = ipaddress.ip_address(host.strip("[]"))
        name, family = str(number), socket.AF_INET6 if number.version == 6 else socket.AF_INET
    except ValueError:
        family, _, _, _, found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        name = str(found[0])
    _check(listen, is_loopback=ipaddress.ip_address(name.partition("%")[0]).is_loopback, insecure=insecure)
    return socket.create_server((name, int(port)), family=family, backlog=_BACKLOG)


def _check(listen: str, *, is_loopback: bool, insecure: bool) -> None:
    if not (is_loopback or insecure):
        raise StartError(
            f"listening on {listen} would open this service to the network in plain text: "
            "pass --insecure if only trusted processes reach that address"
        )
