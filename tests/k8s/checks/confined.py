"""Is every pod confined as the restricted Pod Security Standard demands?

The namespace has the API server enforce the standard, https://kubernetes.io/docs/concepts/security/pod-security-standards/.
The server refuses pods, not Deployments: the table below finds the mistake before a rollout hangs. The table is
stricter than the standard if the mesh needs less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .model import Document, Manifests, at, dict_at, list_at, title

APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
"""The prefix of annotations that had AppArmor's profile before there was a field."""
ENFORCE = "pod-security.kubernetes.io/enforce"

NOT_SET: tuple[Any, ...] = (None,)
OFF = (None, False)
CONFINED = ("RuntimeDefault", "Localhost")

POD: dict[str, tuple[Any, ...]] = {
    "hostNetwork": OFF,
    "hostPID": OFF,
    "hostIPC": OFF,
    "automountServiceAccountToken": (False,),
    "securityContext.sysctls": NOT_SET,
    "volumes[].*": ("configMap", "emptyDir", "secret"),
}
"""The fields of a pod and the values that they may have. ``[]`` goes through a list; ``.*`` stands for the name of the
only field beside ``name``."""

CONTAINER: dict[str, tuple[Any, ...]] = {
    "securityContext.privileged": OFF,
    "securityContext.allowPrivilegeEscalation": (False,),
    "securityContext.readOnlyRootFilesystem": (True,),
    "securityContext.capabilities.add": NOT_SET,
    "securityContext.capabilities.drop": (["ALL"],),
    "securityContext.procMount": NOT_SET,
    "securityContext.runAsNonRoot": (True,),
    "securityContext.runAsUser": (10001,),
    "securityContext.seccompProfile.type": CONFINED,
    "securityContext.appArmorProfile.type": (None, *CONFINED),
    "securityContext.seLinuxOptions": NOT_SET,
    "securityContext.windowsOptions.hostProcess": OFF,
    "ports[].hostPort": NOT_SET,
    **{f"{each}.httpGet.host": NOT_SET for each in ("startupProbe", "readinessProbe", "livenessProbe")},
    **{f"{each}.tcpSocket.host": NOT_SET for each in ("startupProbe", "readinessProbe", "livenessProbe")},
    **{f"lifecycle.{each}.httpGet.host": NOT_SET for each in ("postStart", "preStop")},
    **{f"lifecycle.{each}.tcpSocket.host": NOT_SET for each in ("postStart", "preStop")},
}
"""The fields of a container. A field of ``securityContext`` that the container leaves out is the pod's."""


def the_namespace_enforces_the_restricted_standard(manifests: Manifests) -> Iterator[str]:
    for namespace in manifests.of("Namespace"):
        level = at(namespace, "metadata", "labels", ENFORCE)
        if level != "restricted":
            yield f"{title(namespace)}: {ENFORCE} is {level}, should be restricted"


def pods_meet_the_restricted_standard(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        yield from _refused(str(workload), workload.pod, POD)
        for key in workload.annotations:
            if key.startswith(APPARMOR):
                yield f"{workload}: annotation {key} is set, should be left out"
        inherited = dict_at(workload.pod, "securityContext")
        for container in workload.containers:
            own = dict_at(container.spec, "securityContext")
            yield from _refused(str(container), container.spec | {"securityContext": inherited | own}, CONTAINER)


def _refused(where: str, part: Document, table: dict[str, tuple[Any, ...]]) -> Iterator[str]:
    for path, allowed in table.items():
        for value in _values(part, path.split(".")):
            if value not in allowed:
                yield f"{where}: {path} is {value!r}, should be {' or '.join(map(_shown, allowed))}"


def _values(value: Any, path: list[str]) -> list[Any]:
    """Return all values at a path; None where a field is not set."""
    if not path:
        return [value]
    field, *rest = path
    if field == "*":
        return sorted(value.keys() - {"name"}) or [None]
    if field.endswith("[]"):
        return [found for each in list_at(value, field[:-2]) for found in _values(each, rest)]
    return _values(at(value, field), rest)


def _shown(value: Any) -> str:
    return "left out" if value is None else repr(value)


RULES = (the_namespace_enforces_the_restricted_standard, pods_meet_the_restricted_standard)
