"""Loopback ports for the processes of a mesh."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from atserving.errors import StartError

# Linux gives higher ports to outgoing connections: none of them takes a chosen port before its server binds it.
_RANGE = range(10_000, 32_000)


@dataclass(frozen=True)
class Ports:
    """The loopback ports of a mesh."""

    edge: int
    ops: int
    gates: tuple[int, ...]
    registry: int
    etcd: int
    files: int

    @staticmethod
    def free(edge: int = 0, gates: int = 1) -> Ports:
        """Choose unused ports. A nonzero ``edge`` stays the edge's port."""
        first, ops, registry, etcd, files, *rest = free_ports(5 + gates)
        return Ports(edge or first, ops, tuple(rest), registry, etcd, files)


def free_ports(count: int) -> list[int]:
    """Choose loopback ports without a listener."""
    candidates = _candidates()
    return [next(candidates) for _ in range(count)]


def _candidates() -> Iterator[int]:
    for port in random.sample(_RANGE, len(_RANGE)):
        if _is_free(port):
            yield port


def check_free(port: int) -> None:
    """Raise StartError if the edge's port is in use; 0 stands for any port."""
    if not _is_free(port):
        raise StartError(f"port {port} is in use: choose another with --port or PORT=")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Servers set this option too: recently closed connections do not block a port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
