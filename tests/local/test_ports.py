"""The ports of a local mesh are its own, and a port that cannot be used says why."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from atserving.errors import StartError
from atserving.local import ports
from atserving.local.ports import Ports, check_free, free_ports
from atserving.sockets import listening_socket


def test_no_other_process_of_a_mesh_gets_the_port_of_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    edge, *others = free_ports(8)
    monkeypatch.setattr(ports, "_RANGE", [edge, *others, *free_ports(7)])
    for _ in range(20):
        monkeypatch.setattr(ports, "_chosen", set(), raising=False)
        chosen = Ports.free(edge, gates=2)
        assert chosen.edge == edge
        rest = [chosen.ops, *chosen.gates, chosen.registry, chosen.etcd, chosen.files]
        assert edge not in rest
        assert len(set(rest)) == len(rest)


def test_no_port_is_chosen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    some = free_ports(6)
    monkeypatch.setattr(ports, "_RANGE", range(min(some), max(some) + 1))
    monkeypatch.setattr(ports, "_chosen", set(ports._RANGE) - set(some), raising=False)
    assert {*free_ports(3), *free_ports(3)} == set(some)
    with pytest.raises(StartError, match="is left: the last one was chosen before"):
        free_ports(1)


async def test_a_port_in_use_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartError, match=f"^port {port} is in use: choose another with --port or PORT="):
            check_free(port)
        with pytest.raises(StartError, match="the address is in use"):
            await listening_socket(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("number", "local", "listening"),
    [
        (errno.EACCES, "cannot be used (Permission denied)", "permission denied"),
        (errno.EADDRNOTAVAIL, "cannot be used (Cannot assign requested address)", "the address is not this machine's"),
    ],
)
async def test_a_port_that_is_not_in_use_does_not_say_so(
    monkeypatch: pytest.MonkeyPatch, number: int, local: str, listening: str
) -> None:
    # As root, every port may be used.
    def bind(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(StartError) as refused:
        check_free(80)
    assert str(refused.value) == f"port 80 {local}: choose another with --port or PORT="
    with pytest.raises(StartError) as refused:
        free_ports(1)
    assert local in str(refused.value)
    with pytest.raises(StartError) as refused:
        await listening_socket("127.0.0.1:80")
    assert str(refused.value) == f"cannot listen on 127.0.0.1:80: {listening}"
