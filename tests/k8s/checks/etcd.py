"""Rules of etcd: where its members keep what they know, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator

from .files import mount_of
from .model import Manifests, Workload, at


def claimed_volumes_are_writable(manifests: Manifests) -> Iterator[str]:
    """A new volume is root's, unless the kubelet gives it to a group of the pod's."""
    for workload in manifests.workloads:
        if _claimed(workload) and at(workload.pod, "securityContext", "fsGroup") is None:
            yield f"{workload}: has no fsGroup, so that its user can't write to {', '.join(sorted(_claimed(workload)))}"


def data_is_kept(manifests: Manifests) -> Iterator[str]:
    for workload in _members(manifests):
        writable = {each["name"] for each in workload.volumes if "emptyDir" in each}
        for container in workload.lasting:
            folder = container.flag("data-dir", "ETCD")
            mount = mount_of(container, folder or "")
            if mount is None:
                yield f"{container} keeps its data in {folder}, which is in none of its volumes"
            elif mount.get("readOnly") or mount["name"] not in (_claimed(workload) or writable):
                yield f"{container} keeps its data in {folder}, of volume {mount['name']!r}, which does not keep it"


def members_are_all_named(manifests: Manifests) -> Iterator[str]:
    for workload in _members(manifests):
        wanted = [f"{workload.name}-{number}" for number in range(manifests.replicas(workload))]
        for container in workload.lasting:
            cluster = container.flag("initial-cluster", "ETCD") or ""
            named = [each.partition("=")[0] for each in cluster.split(",")]
            if sorted(named) != sorted(wanted):
                yield f"{container} has --initial-cluster of {', '.join(named)}, should be of {', '.join(wanted)}"


def _members(manifests: Manifests) -> list[Workload]:
    return [each for each in manifests.workloads if each.component == "etcd"]


def _claimed(workload: Workload) -> set[str]:
    """The volumes of a workload that are claims."""
    own = {str(at(each, "metadata", "name")) for each in workload.claims}
    return own | {each["name"] for each in workload.volumes if "persistentVolumeClaim" in each}


RULES = (
    claimed_volumes_are_writable,
    data_is_kept,
    members_are_all_named,
)
