"""Landlock: which files a process may use, and that it reaches no other process. See linux/Documentation/landlock.

The package ``landlock`` of the index knows files alone, neither processes nor sockets, and has no finished version.
The interface is three system calls.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from evaluator.sandbox import system

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

READ = _EXECUTE | _READ_FILE | _READ_DIR
LIST = _READ_DIR
# All that there is to do with files, but not to make devices.
WRITE = ((1 << 15) - 1) & ~(_MAKE_CHAR | _MAKE_BLOCK)
DEVICE = _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV

_ABSTRACT_SOCKETS, _SIGNALS = 1, 2


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """Return the version of Landlock's interface; 0 if the kernel has none, or a container's filter forbids it."""
    try:
        return system.call(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return 0


def restrict(version: int, rules: Iterable[tuple[str, int]]) -> None:
    """Forbid this thread, and all that it starts, all files but those of ``rules``: paths, and what is allowed there.

    A path that does not exist is left out. From then on it can't trace another process or read its memory; from
    version 6 on it can't send a signal to one or connect to its abstract sockets. Raises OSError.
    """
    handled = _handled(version)
    scoped = _ABSTRACT_SOCKETS | _SIGNALS if version >= 6 else 0
    # An older kernel refuses the fields that it does not know.
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = system.call(_CREATE_RULESET, _Ruleset(handled, 0, scoped), size, 0)
    try:
        for path, access in rules:
            _allow(ruleset, path, access & handled)
        system.call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _handled(version: int) -> int:
    """Return all rights over files that a version knows."""
    return (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            access &= _OF_FILES
        if access:
            system.call(_ADD_RULE, ruleset, _PATH_BENEATH, _Beneath(access, parent), 0)
    finally:
        os.close(parent)
