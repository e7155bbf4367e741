"""Loopback ports for the processes of a mesh."""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass

from atserving.errors import StartError

# Linux gives higher ports to outgoing connections: none of them takes a chosen port before its server binds it.
_RANGE = range(10_000, 32_000)

_chosen: set[int] = set()


@dataclass(frozen=True)
class Ports:
    """The loopback ports of a mesh."""

    edge: int
    edge_tls: int
    ops: int
    operators: int
    gates: tuple[int, ...]
    registry: int
    etcd: int
    files: int

    @staticmethod
    def free(edge: int = 0, gates: int = 1) -> Ports:
        """Choose unused ports. A nonzero ``edge`` stays the edge's port."""
        _chosen.add(edge)
        first, tls, ops, operators, registry, etcd, files, *rest = free_ports(7 + gates)
        return Ports(edge or first, tls, ops, operators, tuple(rest), registry, etcd, files)


def free_ports(count: int) -> list[int]:
    """Choose loopback ports without a listener; no call of this process returns one again. Raises StartError."""
    ports: list[int] = []
    reason = "was chosen before"
    for port in random.sample(_RANGE, len(_RANGE)):
        if len(ports) == count:
            break
        if port in _chosen:
            continue
        if refused := _refused(port):
            reason = _reason(refused)
            continue
        ports.append(port)
        _chosen.add(port)
    if len(ports) < count:
        raise StartError(f"no port from {_RANGE.start} to {_RANGE.stop - 1} is left: the last one {reason}")
    return ports


def check_free(port: int) -> None:
    """Raise StartError if the edge cannot listen on this port; 0 stands for any port."""
    if refused := _refused(port):
        raise StartError(f"port {port} {_reason(refused)}: choose another with --port or PORT=")


def _reason(refused: OSError) -> str:
    if refused.errno == errno.EADDRINUSE:
        return "is in use"
    return f"cannot be used ({refused.strerror})"


def _refused(port: int) -> OSError | None:
    """Return the error of a server that would listen on this port."""
    with socket.socket() as probe:
        # Servers set this option too: recently closed connections do not block a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error
    return None
