"""Rules of how pods take the place of others: updates, undoing them, and what those that go wait for."""

from __future__ import annotations

from collections.abc import Iterator

from .containers import pre_stop_s
from .model import Manifests, at

# Those that others find by the name of a headless Service, and for how long these may go on with an answer of DNS:
# CoreDNS has them for 30 s as it is set up by default, and Envoy asks every 5 s.
FOUND_BY_NAME = ("gate", "registry")
NAMES_ARE_KEPT_S = 35

# What the server takes for a Deployment that has none.
_PROGRESS_DEADLINE_S = 600


def updates_take_no_pod_away(manifests: Manifests) -> Iterator[str]:
    """The new serves before the old goes."""
    for workload in manifests.workloads:
        strategy = at(workload.document, "spec", "strategy", default={})
        if workload.kind != "Deployment":
            continue
        if strategy.get("type", "RollingUpdate") != "RollingUpdate":
            yield f"{workload}: its strategy is {strategy['type']}, should be RollingUpdate"
        elif at(strategy, "rollingUpdate", "maxUnavailable") not in (0, "0%"):
            yield f"{workload}: its rolling update should have maxUnavailable: 0"
        elif at(strategy, "rollingUpdate", "maxSurge", default=1) in (0, "0%"):
            yield f"{workload}: its rolling update can't start a new pod"


def members_are_updated(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        strategy = at(workload.document, "spec", "updateStrategy", default={})
        if strategy.get("type", "RollingUpdate") != "RollingUpdate":
            yield f"{workload}: its update strategy is {strategy['type']}, should be RollingUpdate"
        if at(strategy, "rollingUpdate", "partition"):
            yield f"{workload}: its updates leave {strategy['rollingUpdate']['partition']} pods as they are"


def updates_can_be_undone(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if at(workload.document, "spec", "revisionHistoryLimit") == 0:
            yield f"{workload}: has revisionHistoryLimit: 0, so that nothing can be undone"


def updates_go_on(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if at(workload.document, "spec", "paused"):
            yield f"{workload}: is paused"


def progress_has_time(manifests: Manifests) -> Iterator[str]:
    """The server refuses what could never be done in time."""
    for workload in manifests.workloads:
        least = at(workload.document, "spec", "minReadySeconds", default=0)
        most = at(workload.document, "spec", "progressDeadlineSeconds", default=_PROGRESS_DEADLINE_S)
        if workload.kind == "Deployment" and least >= most:
            yield f"{workload}: a pod counts once it is ready for {least} s, and {most} s are all the time there is"


def pods_are_there(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if at(workload.document, "spec", "replicas") == 0:
            yield f"{workload}: has replicas: 0, and serves nobody"


def names_outlive_no_pod(manifests: Manifests) -> Iterator[str]:
    """A pod goes on as ever until those that found it by its name have asked for that again."""
    for workload in manifests.workloads:
        for container in workload.lasting if workload.component in FOUND_BY_NAME else ():
            if pre_stop_s(container) < NAMES_ARE_KEPT_S:
                sleeps = f"sleeps for {pre_stop_s(container):g} s before it stops"
                yield f"{container} {sleeps}, and is looked for by its name for {NAMES_ARE_KEPT_S} s"


RULES = (
    updates_take_no_pod_away,
    members_are_updated,
    updates_can_be_undone,
    updates_go_on,
    progress_has_time,
    pods_are_there,
    names_outlive_no_pod,
)
