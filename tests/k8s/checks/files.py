"""Rules of files: those that containers name are there, and can be read."""

from __future__ import annotations

from collections.abc import Iterator

from .model import Container, Document, Manifests, at
from .references import files_of

# Where Kubernetes itself puts a file, unless it is told to put it elsewhere.
_TERMINATION_LOG = "/dev/termination-log"
_READ_BY_OTHERS = 0o004
_DEFAULT_MODE = 0o644


def paths_are_mounted(manifests: Manifests) -> Iterator[str]:
    """Of what is not mounted, an image has what it needs, and its file system can't be written to."""
    for workload in manifests.workloads:
        for container in workload.containers:
            log = at(container.spec, "terminationMessagePath", default=_TERMINATION_LOG)
            for path in dict.fromkeys(each for each in _paths(container) if each != log):
                mount = mount_of(container, path)
                if mount is None:
                    yield f"{container} names {path}, which is in none of its volumes"
                    continue
                files = files_of(manifests, workload, mount["name"])
                if files is not None and not _has(files, file_in(mount, path)):
                    yield f"{container} names {path}, which volume {mount['name']!r} has not"


def files_can_be_read(manifests: Manifests) -> Iterator[str]:
    """Files of a volume are root's; a group of the pod's may read them all the same."""
    for workload in manifests.workloads:
        if at(workload.pod, "securityContext", "fsGroup") is not None:
            continue
        for volume in workload.volumes:
            for mode in dict.fromkeys(each for each in _modes(volume) if not each & _READ_BY_OTHERS):
                yield f"{workload}: volume {volume['name']!r} has files of mode {mode:04o}, which its user can't read"


def mount_of(container: Container, path: str) -> Document | None:
    """The innermost mount that a path is at or below."""
    mounts = [each for each in at(container.spec, "volumeMounts", default=[]) if _is_below(path, each["mountPath"])]
    return max(mounts, key=lambda each: len(each["mountPath"]), default=None)


def file_in(mount: Document, path: str) -> str:
    """The name in its volume of what is mounted at a path; empty for the whole volume."""
    below = path.removeprefix(mount["mountPath"].rstrip("/")).strip("/")
    return "/".join(each for each in (mount.get("subPath", "").strip("/"), below) if each)


def _is_below(path: str, folder: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def _has(files: set[str], name: str) -> bool:
    return not name or any(_is_below(each, name) for each in files)


def _paths(container: Container) -> Iterator[str]:
    """The absolute paths among its arguments, the values of its flags and variables, and the words of its hooks."""
    yield from (str(each) for each in at(container.spec, "args", default=[]) if str(each).startswith("/"))
    for word in (str(each) for each in at(container.spec, "args", default=[])):
        if word.startswith("-") and word.partition("=")[2].startswith("/"):
            yield word.partition("=")[2]
    for variable in at(container.spec, "env", default=[]):
        if str(variable.get("value", "")).startswith("/"):
            yield str(variable["value"])
    for hook in ("postStart", "preStop"):
        # The first word is a program of the image.
        words = at(container.spec, "lifecycle", hook, "exec", "command", default=[])[1:]
        yield from (str(each) for each in words if str(each).startswith("/"))


def _modes(volume: Document) -> Iterator[int]:
    for kind in ("configMap", "secret", "downwardAPI", "projected"):
        if kind in volume:
            default = at(volume, kind, "defaultMode", default=_DEFAULT_MODE)
            yield default
            for source in (volume, *at(volume, "projected", "sources", default=[])):
                for each in ("configMap", "secret", "downwardAPI"):
                    yield from (at(item, "mode", default=default) for item in at(source, each, "items", default=[]))


RULES = (
    paths_are_mounted,
    files_can_be_read,
)
