"""Does every pod find the files, variables and accounts that it names?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .model import Container, Document, Manifests, Workload, at, dict_at, list_at

OUTSIDE = "atserving/secrets-from-outside"
"""An annotation of a pod template: the Secrets that the operator makes, separated by commas.

A component has one of its own, with a dot and its name behind: one cannot add to another's.
"""

# Kubernetes itself makes this file, unless a field names another.
_TERMINATION_LOG = "/dev/termination-log"
_READ_BY_OTHERS = 0o004
_SOURCES = (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName"))
_KEYS = (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret"))
_VARIABLE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")

# A ConfigMap or Secret that a pod refers to: its kind, its name, and one key, or all.
Reference = tuple[str, str, str | None]


def configs_and_secrets_exist(manifests: Manifests) -> Iterator[str]:
    """A pod whose ConfigMap or Secret is missing waits for it without an error."""
    for workload in manifests.workloads:
        for kind, name, key in dict.fromkeys(_references(workload)):
            document = manifests.find(kind, name)
            if document is None:
                if not (kind == "Secret" and name in _outside(workload)):
                    yield f"{workload}: there is no {kind} {name}"
            elif key is not None and key not in keys_of(document):
                yield f"{workload}: {kind} {name} has no key {key}"


def secrets_from_outside_are_used(manifests: Manifests) -> Iterator[str]:
    """The annotation excuses a missing Secret, so it may name no Secret but those."""
    for workload in manifests.workloads:
        used = {name for kind, name, _ in _references(workload) if kind == "Secret"}
        for name in _outside(workload):
            if name not in used:
                yield f"{workload}: {OUTSIDE} names {name}, which it does not use"
            if manifests.find("Secret", name):
                yield f"{workload}: {OUTSIDE} names {name}, which is among the manifests"


def accounts_exist(manifests: Manifests) -> Iterator[str]:
    """A Deployment whose ServiceAccount is missing makes no pods."""
    for workload in manifests.workloads:
        name = workload.pod.get("serviceAccountName", "default")
        if not manifests.find("ServiceAccount", name):
            yield f"{workload}: there is no ServiceAccount {name}"


def mounts_and_volumes_agree(manifests: Manifests) -> Iterator[str]:
    """The API server looks at the mounts of a Deployment, but not at those of a StatefulSet."""
    for workload in manifests.workloads:
        declared = {each["name"] for each in workload.volumes} | workload.claims
        mounted = {mount["name"] for container in workload.containers for mount in container.mounts}
        for name in sorted(mounted - declared):
            yield f"{workload}: mounts volume {name!r}, which is not declared"
        for name in sorted(declared - mounted):
            yield f"{workload}: volume {name!r} is mounted nowhere"


def variables_are_set_before_they_are_used(manifests: Manifests) -> Iterator[str]:
    """Kubernetes leaves ``$(NAME)`` as it is where no variable above has that name."""
    for _, container in manifests.containers:
        known: set[str] = set()
        for variable in container.variables:
            for name in _used(variable.get("value", "")):
                if name not in known:
                    yield f"{container}: variable {variable['name']} uses $({name}), which is not set before it"
            known.add(variable["name"])
        for name in dict.fromkeys(name for word in container.words for name in _used(word)):
            if name not in known:
                yield f"{container}: its arguments use $({name}), which is not set"


def files_are_mounted(manifests: Manifests) -> Iterator[str]:
    """The image has no file that these arguments could name, and its file system is read-only."""
    for workload, container in manifests.containers:
        log = at(container.spec, "terminationMessagePath", default=_TERMINATION_LOG)
        for path in dict.fromkeys(each for each in _paths(container) if each != log):
            mount = mount_of(container, path)
            if mount is None:
                yield f"{container} names {path}, which is in none of its volumes"
                continue
            files = files_of(manifests, workload, mount["name"])
            if files is not None and file_in(mount, path) not in {"", *files}:
                yield f"{container} names {path}, which volume {mount['name']!r} does not have"


def files_can_be_read(manifests: Manifests) -> Iterator[str]:
    """Files of a volume belong to root; ``fsGroup`` lets the pod's user read them whatever their mode."""
    for workload in manifests.workloads:
        if at(workload.pod, "securityContext", "fsGroup") is None:
            for volume in workload.volumes:
                for mode in _modes(volume):
                    if not mode & _READ_BY_OTHERS:
                        yield f"{workload}: its user cannot read mode {mode:04o} of volume {volume['name']!r}"


def claimed_volumes_can_be_written(manifests: Manifests) -> Iterator[str]:
    """A new volume belongs to root; with ``fsGroup`` the kubelet gives it to the pod's group."""
    for workload in manifests.workloads:
        if workload.claims and at(workload.pod, "securityContext", "fsGroup") is None:
            yield f"{workload}: has no fsGroup, so its user cannot write to {', '.join(sorted(workload.claims))}"


def etcd_keeps_its_data(manifests: Manifests) -> Iterator[str]:
    """Data is in a claim where the workload has one; the minimal overlay has an emptyDir instead."""
    for workload, container in manifests.containers:
        if workload.component != "etcd":
            continue
        scratch = {each["name"] for each in workload.volumes if "emptyDir" in each}
        folder = container.flag("data-dir", "ETCD")
        mount = mount_of(container, folder or "")
        if mount is None:
            yield f"{container} keeps its data in {folder}, which is in none of its volumes"
        elif mount.get("readOnly") or mount["name"] not in (workload.claims or scratch):
            yield f"{container} keeps its data in {folder}, on volume {mount['name']!r}, which does not keep it"


def the_last_config_is_kept(manifests: Manifests) -> Iterator[str]:
    """A gate or an evaluator starts with it while no registry answers. An emptyDir outlives its container."""
    for workload, container in manifests.containers:
        if workload.component in ("gate", "evaluator"):
            path = container.flag("config-cache")
            mount = mount_of(container, path or "")
            scratch = {each["name"] for each in workload.volumes if "emptyDir" in each}
            if mount is None or mount.get("readOnly") or mount["name"] not in scratch:
                yield f"{container} keeps its last config in {path}, in no emptyDir that it can write"


def mount_of(container: Container, path: str) -> Document | None:
    """Return the innermost mount that a path is at or below."""
    mounts = [each for each in container.mounts if f"{path}/".startswith(f"{each['mountPath'].rstrip('/')}/")]
    return max(mounts, key=lambda each: len(each["mountPath"]), default=None)


def file_in(mount: Document, path: str) -> str:
    """Return the name that a path has in its volume; empty for the volume's folder."""
    return path.removeprefix(mount["mountPath"].rstrip("/")).strip("/")


def files_of(manifests: Manifests, workload: Workload, volume: str) -> set[str] | None:
    """Return the names of a volume's files; None where the manifests do not say."""
    for each in workload.volumes:
        for field, kind, name in _SOURCES:
            if each["name"] == volume and field in each:
                if each[field].get("items"):
                    return {item["path"] for item in each[field]["items"]}
                document = manifests.find(kind, str(each[field].get(name)))
                return keys_of(document) if document else None
    return None


def keys_of(document: Document) -> set[str]:
    return {key for field in ("data", "binaryData", "stringData") for key in dict_at(document, field)}


def _outside(workload: Workload) -> list[str]:
    values = [value for name, value in workload.annotations.items() if f"{name}.".startswith(f"{OUTSIDE}.")]
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def _references(workload: Workload) -> Iterator[Reference]:
    for secret in list_at(workload.pod, "imagePullSecrets"):
        yield "Secret", secret["name"], None
    for volume in workload.volumes:
        for field, kind, name in _SOURCES:
            if field in volume:
                yield kind, str(volume[field].get(name)), None
                for item in volume[field].get("items") or []:
                    yield kind, str(volume[field].get(name)), item["key"]
    for container in workload.containers:
        for variable in container.variables:
            for field, kind in _KEYS:
                if reference := at(variable, "valueFrom", field):
                    yield kind, str(reference.get("name")), reference["key"]


def _paths(container: Container) -> Iterator[str]:
    """The absolute paths among a container's arguments, flags, variables and the arguments of its hooks."""
    texts = [str(each) for each in list_at(container.spec, "args")]
    texts += [each.partition("=")[2] for each in texts if each.startswith("-")]
    texts += [str(each.get("value", "")) for each in container.variables]
    for hook in ("postStart", "preStop"):
        # The first word is a program of the image.
        texts += list_at(container.spec, "lifecycle", hook, "exec", "command")[1:]
    return (each.rstrip("/") for each in texts if each.startswith("/"))


def _modes(value: Any) -> Iterator[int]:
    """All modes in a volume, wherever they are set."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        if key in ("mode", "defaultMode"):
            yield each
        yield from _modes(each)


def _used(text: str) -> list[str]:
    return [match[1] for match in _VARIABLE.finditer(text) if match[1]]


RULES = (
    configs_and_secrets_exist,
    secrets_from_outside_are_used,
    accounts_exist,
    mounts_and_volumes_agree,
    variables_are_set_before_they_are_used,
    files_are_mounted,
    files_can_be_read,
    claimed_volumes_can_be_written,
    etcd_keeps_its_data,
    the_last_config_is_kept,
)
