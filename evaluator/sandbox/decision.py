"""Decides what a release's worker may do, and tells what of it this host can enforce."""

from __future__ import annotations

import glob
import os
import site
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import atserving
import evaluator
from atserving.errors import StartError
from evaluator.net_config import NetConfig
from evaluator.sandbox import landlock, seccomp
from evaluator.sandbox.policy import Policy

_GIB = 1 << 30
MAX_OPEN_FILES = 4096

# Names and, with a star, starts of names. None of them is a secret, and libraries or their users need them.
_VARIABLES = (
    *("PATH", "HOME", "LANG", "LANGUAGE", "LC_*", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_*", "GLIBC_TUNABLES"),
    *("PYTHON*", "OMP_*", "KMP_*", "OPENBLAS_*", "MKL_*", "ORT_*", "OPENCV_*", "CUDA_*"),
    # There are others of this start, such as NVIDIA_API_KEY.
    *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_*", "NVIDIA_TF32_OVERRIDE"),
)

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix/store")
_ETC = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "localtime", "timezone", "passwd", "group"),
    *("nsswitch.conf", "host.conf", "hosts", "resolv.conf", "gai.conf", "services", "protocols"),
    *("ssl/certs", "ssl/openssl.cnf", "pki/tls/certs", "pki/tls/openssl.cnf", "pki/ca-trust/extracted", "alternatives"),
)
_KERNEL = (
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/loadavg", "/proc/version", "/proc/filesystems"),
    *(
        "/proc/uptime",
        "/proc/sys/vm",
        "/proc/sys/kernel",
        "/sys/devices",
        "/sys/class/drm",
        "/sys/bus/pci",
        "/sys/fs/cgroup",
        "/sys/kernel/mm",
    ),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

# CUDA's driver: its devices, where it looks for them, and the memory that its processes share.
_GPU_DEVICES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dxg", "/dev/dri/*")
_GPU_FILES = ("/proc/driver", "/proc/devices", "/proc/modules", "/sys", "/etc/nvidia*", "/etc/OpenCL", "/run/nvidia*")
_GPU_SHARED = "/dev/shm"  # noqa: S108


class Mode(StrEnum):
    """How much of the sandbox there must be."""

    REQUIRE = "require"
    """All of it, or a script does not start."""
    AUTO = "auto"
    """What the host can enforce."""
    OFF = "off"


@dataclass(frozen=True)
class SandboxSettings:
    """What the operator of an evaluator says about its worker."""

    mode: Mode = Mode.AUTO
    network: bool = False
    """Whether a script that asks for the network gets it."""
    scripts: bool = True
    """Whether a script may run at all."""
    processes: int = 256 + 16 * (os.cpu_count() or 1)
    """The most processes and threads of a script."""
    file_bytes: int = _GIB
    """The size of the largest file that a script may write."""


@dataclass(frozen=True)
class Sandbox:
    """The sandbox of one release's worker, and what holds of it."""

    mode: Mode
    network: bool
    policy: Policy | None
    """None: there is no sandbox."""
    environment: Mapping[str, str]
    processes: int = 0
    """The most processes and threads; 0: no limit."""
    holds: tuple[str, ...] = ()
    missing: tuple[str, ...] = field(default=())
    """What does not hold, each with the reason."""


def of_release(config: NetConfig, settings: SandboxSettings) -> Sandbox:
    """Return the sandbox of a release's worker on this host.

    Raises StartError if the release may not start: for a script that is forbidden, asks for a network that is not
    allowed, or has to be confined better than this host can.
    """
    script = bool(config.script)
    if script and not settings.scripts:
        raise StartError("the release has a net.py, and --scripts is forbid")
    asks = config.model_params.boolean("network", False)
    if script and asks and not settings.network:
        raise StartError("model_params.network is true, but this evaluator does not allow it: --allow-script-network")
    network = script and asks
    if settings.mode is Mode.OFF:
        return Sandbox(settings.mode, True, None, {**os.environ}, missing=("--sandbox is off",))
    version, filters = landlock.version(), seccomp.is_available()
    gpu = config.use_device != "CPU"
    holds, missing = _holding(version, filters, network=network, gpu=gpu)
    if script and missing and settings.mode is Mode.REQUIRE:
        raise StartError(f"--sandbox is require, but this host can't confine a net.py fully: {'; '.join(missing)}")
    policy = Policy(
        str(config.workspace) if config.workspace else None,
        version,
        filters,
        reads=tuple(_readable(config, gpu=gpu)),
        lists=(_packages(),),
        writes=_writable(config, gpu=gpu),
        devices=_devices(gpu=gpu),
        families=_families(network=network, gpu=gpu),
        file_bytes=settings.file_bytes if script else 0,
        open_files=MAX_OPEN_FILES,
    )
    return Sandbox(
        settings.mode,
        network,
        policy,
        _environment(),
        processes=settings.processes if script else 0,
        holds=tuple(holds),
        missing=tuple(missing),
    )


def _holding(version: int, filters: bool, *, network: bool, gpu: bool) -> tuple[list[str], list[str]]:
    """Return what holds, and what does not, with the reasons."""
    no_filter = "this machine or its kernel has no seccomp filter"
    has = f"Landlock {version or 'is missing'}"
    reasons = {
        "environment": "",
        "limits": "",
        "files": "" if version >= 3 else f"{has}, it takes version 3, Linux 6.2",
        "processes": "" if version else f"{has}, it takes Linux 5.13 with Landlock on",
        "signals": "" if version >= 6 else f"{has}, it takes version 6, Linux 6.12",
        "session": "" if filters else no_filter,
    }
    if not network:
        reasons["network"] = "" if filters else no_filter
    if gpu:
        reasons["local sockets"] = "CUDA needs them"
    held = [name for name, reason in reasons.items() if not reason]
    return held, [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def _readable(config: NetConfig, *, gpu: bool) -> Iterable[str]:
    yield from _SYSTEM
    yield from (f"/etc/{name}" for name in _ETC)
    yield from _KERNEL
    yield "/proc/self"
    yield from {sys.prefix, sys.base_prefix, sys.exec_prefix, *site.getsitepackages()}
    yield from (str(Path(package.__path__[0])) for package in (evaluator, atserving))
    yield from _library_folders()
    yield from {str(path.parent) for path in config.tar_files.values()}
    yield from map(str, config.custom_files.values())
    if gpu:
        yield from _found(_GPU_FILES)


def _library_folders() -> Iterable[str]:
    """Yield the folders that the environment names for Python and for libraries."""
    if site.ENABLE_USER_SITE:
        yield site.getusersitepackages()
    # The folder of a checkout holds more than code; its packages are there without it.
    others = {"/", os.path.realpath(_packages())}
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        yield from (folder for folder in _folders(name) if os.path.realpath(folder) not in others)


def _folders(variable: str) -> list[str]:
    """Return the folders of a variable. An empty one would be the working directory."""
    return [os.path.abspath(each) for each in os.environ.get(variable, "").split(os.pathsep) if each]


def _packages() -> str:
    """Return the folder of the project's packages, which Python lists to find them."""
    return str(Path(evaluator.__path__[0]).parent)


def _writable(config: NetConfig, *, gpu: bool) -> tuple[str, ...]:
    scratch = (str(config.workspace),) if config.workspace else ()
    return (*scratch, _GPU_SHARED) if gpu else scratch


def _devices(*, gpu: bool) -> tuple[str, ...]:
    return (*_DEVICES, *_found(_GPU_DEVICES)) if gpu else _DEVICES


def _found(patterns: Iterable[str]) -> list[str]:
    return [path for pattern in patterns for path in glob.glob(pattern)]


def _families(*, network: bool, gpu: bool) -> tuple[int, ...]:
    # The resolver of the C library asks the kernel for addresses over netlink.
    families = [socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK] if network else []
    if gpu:
        families.append(socket.AF_UNIX)
    return tuple(int(family) for family in families)


def _environment() -> dict[str, str]:
    """Return the variables with which a worker starts.

    It is not confined yet, so none of them may lead to files that a script has written. It sets its home and the like
    once it is confined.
    """
    kept = {name: value for name, value in os.environ.items() if _is_kept(name)}
    # The working directory will be the scratch folder: nothing there may be imported as a library.
    kept["PYTHONSAFEPATH"] = "1"
    packages = _packages()
    ours = [] if packages.startswith((sys.prefix, sys.base_prefix)) else [packages]
    return {**kept, "PYTHONPATH": os.pathsep.join([*ours, *_folders("PYTHONPATH")])}


def _is_kept(name: str) -> bool:
    return any(name == each or (each.endswith("*") and name.startswith(each[:-1])) for each in _VARIABLES)
