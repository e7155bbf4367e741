"""System calls that Python and the C library have no functions for."""

from __future__ import annotations

import ctypes
import os

PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_LIBC.prctl.restype = ctypes.c_int


def call(number: int, *arguments: int | bytes | ctypes.Structure | None) -> int:
    """Make a system call. Structures and bytes are passed by their address. Raises OSError."""
    return _checked(int(_LIBC.syscall(ctypes.c_long(number), *map(_argument, arguments))))


def prctl(option: int, *arguments: int | ctypes.Structure) -> None:
    """Set something of this process. Raises OSError."""
    values = [*map(_argument, arguments), *[ctypes.c_ulong(0)] * (4 - len(arguments))]
    _checked(int(_LIBC.prctl(ctypes.c_int(option), *values)))


def _argument(value: int | bytes | ctypes.Structure | None) -> object:
    if isinstance(value, int):
        return ctypes.c_ulong(value)
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
