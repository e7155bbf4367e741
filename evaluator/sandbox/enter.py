"""Enters the sandbox. Call it while the process has one thread: other threads would stay outside."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from evaluator.sandbox import landlock, seccomp, system
from evaluator.sandbox.policy import Policy

_CAPSET = 126 if os.uname().machine == "x86_64" else 91
_CAPABILITIES_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 2
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_LEAST_OOM_SCORE = 500


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    # Effective, permitted, inheritable: the low halves, then the high ones.
    _fields_ = (("low", ctypes.c_uint32 * 3), ("high", ctypes.c_uint32 * 3))


def enter(policy: Policy) -> None:
    """Confine this process for good. Raises OSError, also if it has several threads."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise OSError(errno.EBUSY, "the worker has threads before it is confined")
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, policy.open_files)
    if policy.file_bytes:
        limit(resource.RLIMIT_FSIZE, policy.file_bytes)
    _die_first()
    system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    if policy.landlock:
        # The kernel forgets the rule of a folder below /proc that nobody has open.
        os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)
        landlock.restrict(policy.landlock, _rules(policy))
    if policy.seccomp:
        seccomp.restrict(policy.families)
    if policy.folder:
        os.chdir(policy.folder)
        cache = os.path.join(policy.folder, "cuda")
        # Not earlier: Python and the loader of libraries must find nothing of the scratch folder on their way here.
        os.environ.update(HOME=policy.folder, TMPDIR=policy.folder, CUDA_CACHE_PATH=cache)


def protect_front() -> None:
    """Let no other process of this user read the memory and environment of this one."""
    system.prctl(system.PR_SET_DUMPABLE, 0)


def limit(of: int, most: int) -> None:
    """Set a limit of this process for good, unless there is a lower one."""
    _, hard = resource.getrlimit(of)
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(of, (least, least))


def _rules(policy: Policy) -> Iterable[tuple[str, int]]:
    for paths, access in (
        (policy.reads, landlock.READ),
        (policy.lists, landlock.LIST),
        (policy.writes, landlock.WRITE),
        (policy.devices, landlock.DEVICE),
    ):
        for path in paths:
            yield path, access


def _die_first() -> None:
    """Let the kernel end this process before the front if memory runs out."""
    with suppress(OSError, ValueError):
        _OOM_SCORE.write_text(str(max(int(_OOM_SCORE.read_text()), _LEAST_OOM_SCORE)))


def _drop_capabilities() -> None:
    """Give up all rights of an administrator but to read: its Python may be in another user's folder."""
    if os.geteuid() == 0:
        kept = 1 << _CAP_DAC_READ_SEARCH
        system.prctl(system.PR_CAP_AMBIENT, system.PR_CAP_AMBIENT_CLEAR_ALL)
    else:
        kept = 0
    header = _Header(_CAPABILITIES_VERSION, 0)
    try:
        system.call(_CAPSET, header, _Capabilities((kept, kept, 0), (0, 0, 0)))
    except PermissionError:
        # A container has taken this one already.
        system.call(_CAPSET, header, _Capabilities((0, 0, 0), (0, 0, 0)))
