"""A hostile net.py reaches for what other processes of its user have in the kernel: sockets, memory, queues, files."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from atserving.local import proc
from tests.evaluator.sandbox.conftest import Host

REFUSED = {"refused": errno.EACCES}
NOT_PERMITTED = {"refused": errno.EPERM}
_IPC_PRIVATE, _IPC_RMID = 0, 0


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A datagram socket with a name, as the system's log has one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "log"))
        yield listening


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_RAW"])
async def test_script_sends_nothing_to_named_sockets_over_a_pair_of_its_own(
    host: Host, listener: socket.socket, kind: str
) -> None:
    code = f"""
    one, _ = socket.socketpair(socket.AF_UNIX, socket.{kind})
    one.sendto(b"forged", {listener.getsockname()!r})
    """
    assert await host.hostile.run(code) == REFUSED
    with pytest.raises(BlockingIOError):
        listener.recv(100, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_SEQPACKET"])
async def test_pairs_of_sockets_that_a_script_may_have_reach_nothing_else(
    host: Host, listener: socket.socket, kind: str
) -> None:
    code = f"""
    found = []
    one, other = socket.socketpair(socket.AF_UNIX, socket.{kind} | socket.SOCK_CLOEXEC)
    one.send(b"1")
    found.append(other.recv(1).decode())
    other.close()
    for reach in (one.connect, one.listen, lambda _: one.sendto(b"forged", {listener.getsockname()!r})):
        try:
            reach(5 if reach == one.listen else {listener.getsockname()!r})
        except OSError:
            found.append("failed")
    """
    assert await host.hostile.run(code) == {"found": ["1", "failed", "failed", "failed"]}


@pytest.mark.parametrize("number", [30, 41])
async def test_script_makes_pairs_of_local_sockets_only(host: Host, number: int) -> None:
    assert await host.hostile.run(f"socket.socketpair({number}, socket.SOCK_STREAM)") == REFUSED


@pytest.fixture
def shared() -> Iterator[tuple[int, int, int]]:
    """The numbers of shared memory, semaphores and a message queue of this user."""
    libc = ctypes.CDLL(None)
    numbers = libc.shmget(_IPC_PRIVATE, 4096, 0o600), libc.semget(_IPC_PRIVATE, 1, 0o600), libc.msgget(0, 0o600)
    assert min(numbers) >= 0
    yield numbers
    libc.shmctl(numbers[0], _IPC_RMID, None)
    libc.semctl(numbers[1], 0, _IPC_RMID)
    libc.msgctl(numbers[2], _IPC_RMID, None)


@pytest.mark.parametrize(
    "code",
    [
        "libc.shmat({0}, None, 0)",
        "libc.shmctl({0}, 0, None)",
        "libc.semop({1}, b'\\0' * 6, 1)",
        "libc.semctl({1}, 0, 0)",
        "libc.semtimedop({1}, b'\\0' * 6, 1, None)",
        "libc.msgsnd({2}, b'\\1' + b'\\0' * 15, 1, 0)",
        "libc.msgrcv({2}, bytes(100), 1, 0, 0o4000)",
        "libc.msgctl({2}, 0, None)",
        "libc.syscall(181 if ARM else 241, b'queue')",
    ],
)
async def test_script_uses_no_memory_and_queues_of_other_processes_by_their_numbers(
    host: Host, shared: tuple[int, int, int], code: str
) -> None:
    code = f"""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("shmat", "msgrcv"):
        getattr(libc, name).restype = ctypes.c_ssize_t
    if {code.format(*shared)} == -1:
        raise OSError(ctypes.get_errno(), "refused")
    """
    assert await host.hostile.run(code) == NOT_PERMITTED


async def test_script_does_not_hold_up_others_that_open_a_file(host: Host) -> None:
    code = """
    import fcntl
    fcntl.fcntl(os.open(cfg["custom_files"]["custom"], os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)
    """
    assert await host.hostile.run(code) == NOT_PERMITTED


@pytest.mark.parametrize("command", [0x40086602, 0x40087602, 0x401C5820, 0x40806685])
async def test_script_does_not_change_the_flags_of_a_file_that_it_reads(host: Host, command: int) -> None:
    code = f"""
    import fcntl
    fcntl.ioctl(os.open(cfg["custom_files"]["custom"], os.O_RDONLY), {command}, bytes(128))
    """
    assert await host.hostile.run(code) == {"refused": errno.EOPNOTSUPP}


async def test_script_does_not_slow_down_all_processes_of_its_user(host: Host) -> None:
    (other,) = (each.pid for each in proc.every_process() if each.parent == host.other.process.pid)
    assert await host.hostile.run("os.setpriority(os.PRIO_USER, 0, 1)") == NOT_PERMITTED
    assert os.getpriority(os.PRIO_PROCESS, other) == 0
    slowing = "found = subprocess.run(['nice', '-n', '1', 'nice'], capture_output=True, text=True).stdout"
    assert await host.hostile.run(slowing) == {"found": "1\n"}
