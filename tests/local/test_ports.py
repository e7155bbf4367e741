"""The ports of a local mesh are its own, and a port that cannot be used says why."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest

from atserving.errors import StartError
from atserving.local import ports
from atserving.local.ports import Ports, check_free, free_ports
from atserving.sockets import listening_socket
from evaluator.serving.advertised import advertised_address


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


@pytest.mark.parametrize("address", ["0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "[2001:db8::1]:0"])
async def test_plain_text_is_for_loopback_alone(address: str) -> None:
    with pytest.raises(StartError, match=r"open this service to the network in plain text: pass --insecure"):
        await listening_socket(address)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.8.8:0", "localhost:0"])
async def test_loopback_needs_no_consent(address: str) -> None:
    with await listening_socket(address) as own:
        assert own.getsockname()[1]


async def test_an_operator_may_open_a_service_in_plain_text() -> None:
    with await listening_socket("0.0.0.0:0", insecure=True) as own:
        assert own.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(
    "command",
    [
        ["gate", "--registry", "127.0.0.1:1"],
        ["registry", "--etcd", "127.0.0.1:1"],
        ["evaluator", "--app", "a", "--version", "v", "--registry", "127.0.0.1:1"],
    ],
    ids=["gate", "registry", "evaluator"],
)
def test_no_service_starts_in_plain_text_for_others_to_reach(command: list[str]) -> None:
    module, *flags = command
    listen = ["--listen", "0.0.0.0:0"]
    done = subprocess.run(
        [sys.executable, "-m", module, *flags, *listen], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"{module}: listening on 0.0.0.0:0 would open this service to the network in plain text: "
        "pass --insecure if only trusted processes reach that address"
    )


def test_an_instance_is_not_registered_where_no_gate_reaches_it() -> None:
    with pytest.raises(
        StartError, match=r"no other machine reaches 127\.0\.0\.1, and the registry is at 192\.0\.2\.1:1"
    ):
        advertised_address(None, "127.0.0.1:0", 5, "192.0.2.1:1")
    assert advertised_address("10.0.0.5:0", "127.0.0.1:0", 5, "192.0.2.1:1") == "10.0.0.5:5"
    assert advertised_address(None, "127.0.0.1:0", 5, "localhost:1") == "127.0.0.1:5"
