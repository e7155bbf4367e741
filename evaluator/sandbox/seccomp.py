"""A filter of system calls: no sockets but those of allowed families, nothing of other processes, no way out of the
process's session.

The package ``pyseccomp`` of the index has had no version since 2021 and needs a library that slim images lack. The
filter is short, and the kernel's numbers of system calls never change.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from evaluator.sandbox import system

# seccomp(2): set a filter. Without the flag, kernels before 5.16 make all code of the process slower with it.
_SET_FILTER, _ALLOW_SPECULATION = 1, 4
# Offsets in struct seccomp_data. Both machines are little-endian: the low half of an argument comes first.
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
# Instructions of classic BPF.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOWED, _ERROR = 0x7FFF0000, 0x00050000
# From here on they are those of x32, on x86-64.
_X32 = 0x40000000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; and CLONE_PARENT, which makes a child of the front.
_FOREIGN = 0x7E028000
# Of a pair of datagram sockets, each could send to any other socket of the machine that has a name.
_SOCKET_TYPE, _PAIRED = 0xF, (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
_PRIO_USER = 2
# A lease on a file, which reading it suffices for, holds up all others that open it.
_F_SETLEASE = 1024
# FS_IOC_SETFLAGS, FS_IOC_SETVERSION, FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY: reading a file suffices for them, too.
_OF_FILES = (0x40086602, 0x40087602, 0x401C5820, 0x40806685)


@dataclass(frozen=True)
class _Machine:
    audit: int
    seccomp: int
    socket: int
    socketpair: int
    clone: int
    setpriority: int
    fcntl: int
    ioctl: int
    forbidden: tuple[int, ...]
    ignored: tuple[int, ...]
    """Landlock does not know them, and they may be another's files. Libraries that copy files count on them."""
    attributes: tuple[int, ...]
    """The same for extended attributes: "not supported" is an answer that libraries know."""
    of_itself: tuple[tuple[int, int], ...]
    """Numbers, and which argument names a process: 0 is the caller."""


_CLONE3 = 435
_MACHINES = {
    "x86_64": _Machine(
        0xC000003E,
        seccomp=317,
        socket=41,
        socketpair=53,
        clone=56,
        setpriority=141,
        fcntl=72,
        ioctl=16,
        forbidden=(
            *(109, 112),  # setpgid, setsid: the front ends a worker with all in its group
            *(101, 310, 311, 438),  # ptrace, process_vm_readv, process_vm_writev, pidfd_getfd
            *(272, 308),  # unshare, setns
            *(425, 426, 427),  # io_uring_setup, io_uring_enter, io_uring_register: they make sockets, too
            *(248, 249, 250),  # add_key, request_key, keyctl
            # Memory, semaphores and queues of other processes: get one, or use one by its number.
            *(29, 30, 31, 64, 65, 66, 220),  # shmget, shmat, shmctl, semget, semop, semctl, semtimedop
            *(68, 69, 70, 71, 240, 241),  # msgget, msgsnd, msgrcv, msgctl, mq_open, mq_unlink
            *(298, 304, 321, 323),  # perf_event_open, open_by_handle_at, bpf, userfaultfd
            *(254, 300, 103, 251),  # inotify_add_watch, fanotify_init, syslog, ioprio_set
        ),
        # chmod, fchmod, fchmodat, fchmodat2; chown, fchown, lchown, fchownat
        ignored=(90, 91, 268, 452, 92, 93, 94, 260),
        # setxattr, lsetxattr, fsetxattr, those that remove, setxattrat, removexattrat, file_setattr
        attributes=(188, 189, 190, 197, 198, 199, 463, 466, 469),
        # prlimit64, sched_setparam, sched_setscheduler, sched_setattr, setpriority
        of_itself=((302, 0), (142, 0), (144, 0), (314, 0), (141, 1)),
    ),
    "aarch64": _Machine(
        0xC00000B7,
        seccomp=277,
        socket=198,
        socketpair=199,
        clone=220,
        setpriority=140,
        fcntl=25,
        ioctl=29,
        forbidden=(
            *(154, 157),
            *(117, 270, 271, 438),
            *(97, 268),
            *(425, 426, 427),
            *(217, 218, 219),
            *(194, 196, 195, 190, 193, 191, 192),
            *(186, 189, 188, 187, 180, 181),
            *(241, 265, 280, 282),
            *(27, 262, 116, 30),
        ),
        ignored=(52, 53, 452, 54, 55),
        attributes=(5, 6, 7, 14, 15, 16, 463, 466, 469),
        of_itself=((261, 0), (118, 0), (119, 0), (274, 0), (140, 1)),
    ),
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def is_available() -> bool:
    """Return whether this kernel and machine can have the filter."""
    machine = _MACHINES.get(platform.machine())
    if not machine:
        return False
    try:
        # There is no filter at this address, which the kernel finds out only if it has filters.
        system.call(machine.seccomp, _SET_FILTER, _ALLOW_SPECULATION, None)
    except OSError as error:
        return error.errno == errno.EFAULT
    return True


def restrict(families: Iterable[int]) -> None:
    """Forbid this thread, and all that it starts, sockets but of ``families``, and some other calls. Raises OSError.

    Needs PR_SET_NO_NEW_PRIVS, or the right of an administrator.
    """
    machine = _MACHINES[platform.machine()]
    instructions = b"".join(_instructions(machine, tuple(families)))
    program = _Program(len(instructions) // 8, instructions)
    system.call(machine.seccomp, _SET_FILTER, _ALLOW_SPECULATION, program)


def _instructions(machine: _Machine, families: tuple[int, ...]) -> Iterable[bytes]:
    refuse = _ERROR | errno.EPERM
    yield _load(_MACHINE)
    yield from _unless(_EQUAL, machine.audit, then=refuse)
    yield _load(_NUMBER)
    yield from _if(_AT_LEAST, _X32, then=refuse)
    # Its arguments are out of reach. The C library then takes clone.
    yield from _if(_EQUAL, _CLONE3, then=_ERROR | errno.ENOSYS)
    for number in machine.forbidden:
        yield from _if(_EQUAL, number, then=refuse)
    for number in machine.ignored:
        yield from _if(_EQUAL, number, then=_ERROR)
    for number in machine.attributes:
        yield from _if(_EQUAL, number, then=_ERROR | errno.EOPNOTSUPP)
    for number, argument in machine.of_itself:
        yield from _where(number, _argument(argument), *_unless(_EQUAL, 0, then=refuse))
    yield from _where(machine.setpriority, _argument(0), *_if(_EQUAL, _PRIO_USER, then=refuse))
    yield from _where(machine.fcntl, _argument(1), *_if(_EQUAL, _F_SETLEASE, then=refuse))
    unsupported = (_if(_EQUAL, command, then=_ERROR | errno.EOPNOTSUPP) for command in _OF_FILES)
    yield from _where(machine.ioctl, _argument(1), *chain(*unsupported))
    yield from _where(machine.clone, _argument(0), *_if(_ANY_BIT, _FOREIGN, then=refuse))
    unreachable = _ERROR | errno.EACCES
    is_local = _unless(_EQUAL, socket.AF_UNIX, then=unreachable)
    kind = (_argument(1), _step(_AND, _SOCKET_TYPE))
    paired = chain(*(_if(_EQUAL, each, then=_ALLOWED) for each in _PAIRED))
    yield from _where(machine.socketpair, _argument(0), *is_local, *kind, *paired, _return(unreachable))
    # NETLINK_ROUTE is enough for the resolver of the C library. Others tell of the sockets and devices of the machine.
    others = (_argument(2), *_unless(_EQUAL, 0, then=unreachable))
    is_netlink = (_argument(0), _jump(_EQUAL, socket.AF_NETLINK, 0, len(others)))
    yield from _where(machine.socket, *is_netlink, *others)
    allowed = (_if(_EQUAL, family, then=_ALLOWED) for family in families)
    yield from _where(machine.socket, _argument(0), *chain(*allowed), _return(unreachable))
    yield _return(_ALLOWED)


def _where(number: int, *steps: bytes) -> tuple[bytes, ...]:
    """Return steps for one system call; after them, the accumulator has the number again."""
    return _jump(_EQUAL, number, 0, len(steps) + 1), *steps, _load(_NUMBER)


def _argument(index: int) -> bytes:
    """Load the low half of an argument."""
    return _load(_FIRST_ARGUMENT + 8 * index)


def _load(offset: int) -> bytes:
    return _step(_LOAD, offset)


def _step(what: int, value: int) -> bytes:
    return struct.pack("<HBBI", what, 0, 0, value)


def _jump(how: int, value: int, skipped_if: int, skipped_else: int) -> bytes:
    return struct.pack("<HBBI", how, skipped_if, skipped_else, value)


def _return(value: int) -> bytes:
    return _step(_RETURN, value)


def _if(how: int, value: int, *, then: int) -> tuple[bytes, bytes]:
    return _jump(how, value, 0, 1), _return(then)


def _unless(how: int, value: int, *, then: int) -> tuple[bytes, bytes]:
    return _jump(how, value, 1, 0), _return(then)
