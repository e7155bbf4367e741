"""The address at which gates reach this instance."""

from __future__ import annotations

import socket

from atserving.errors import StartError
from atserving.loopback import HOSTS

_ANY = ("", "0.0.0.0", "[::]", "*")  # noqa: S104 - recognised, not bound


def advertised_address(advertise: str | None, listen: str, port: int, registry: str) -> str:
    """Return ``host:port``: as advertised, else as listened on, else this machine's address towards ``registry``.

    ``port`` is the port that the server listens on. Blocks on a DNS lookup. Raises StartError.
    """
    host, _, given = (advertise or listen).rpartition(":")
    if advertise:
        return f"{host}:{int(given) or port}"
    if host in HOSTS and registry.rpartition(":")[0] not in HOSTS:
        raise StartError(
            f"no other machine reaches {host}, and the registry is at {registry}: give --listen, or --advertise"
        )
    if host not in _ANY:
        return f"{host}:{port}"
    registry_host, _, registry_port = registry.rpartition(":")
    try:
        family, kind, proto, _, target = socket.getaddrinfo(
            registry_host.strip("[]"), int(registry_port), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, proto) as probe:
            # Connecting a datagram socket sends nothing; it only picks the route.
            probe.connect(target)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise StartError("can't tell this machine's address: give --advertise") from error
    return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
