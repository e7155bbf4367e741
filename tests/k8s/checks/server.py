"""Rules of what the API server refuses though its schema does not say so: words and numbers that a field can't have."""

from __future__ import annotations

from collections.abc import Iterator

from .model import Document, Manifests, at, title

_RESTARTING_PROBES = {"startupProbe": "start-up", "livenessProbe": "liveness"}
_POLICIES = ("Honor", "Ignore")

# By kind, or by what it is a part of: fields, and the words that they can have.
WORDS: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
    "PodDisruptionBudget": {("spec", "unhealthyPodEvictionPolicy"): ("AlwaysAllow", "IfHealthyBudget")},
    "Service": {
        ("spec", "type"): ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort"),
        ("spec", "sessionAffinity"): ("ClientIP", "None"),
        ("spec", "externalTrafficPolicy"): ("Cluster", "Local"),
        ("spec", "internalTrafficPolicy"): ("Cluster", "Local"),
    },
    "StatefulSet": {
        ("spec", "podManagementPolicy"): ("OrderedReady", "Parallel"),
        ("spec", "updateStrategy", "type"): ("OnDelete", "RollingUpdate"),
    },
    "Deployment": {("spec", "strategy", "type"): ("Recreate", "RollingUpdate")},
    "pod": {
        # Of a Deployment or a StatefulSet.
        ("restartPolicy",): ("Always",),
        ("dnsPolicy",): ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
        ("securityContext", "fsGroupChangePolicy"): ("Always", "OnRootMismatch"),
    },
    "container": {
        ("imagePullPolicy",): ("Always", "IfNotPresent", "Never"),
        ("terminationMessagePolicy",): ("FallbackToLogsOnError", "File"),
    },
    "constraint": {
        ("whenUnsatisfiable",): ("DoNotSchedule", "ScheduleAnyway"),
        ("nodeAffinityPolicy",): _POLICIES,
        ("nodeTaintsPolicy",): _POLICIES,
    },
    "toleration": {
        ("operator",): ("Equal", "Exists"),
        ("effect",): ("", "NoExecute", "NoSchedule", "PreferNoSchedule"),
    },
}


def words_are_known(manifests: Manifests) -> Iterator[str]:
    for where, kind, part in _parts(manifests):
        for path, words in WORDS.get(kind, {}).items():
            word = at(part, *path)
            if word is not None and word not in words:
                yield f"{where}: {path[-1]} can't be {word!r}"


def restarting_probes_succeed_once(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for container in workload.lasting:
            for field, name in _RESTARTING_PROBES.items():
                times = at(container.spec, field, "successThreshold", default=1)
                if times != 1:
                    yield f"{container}: its {name} probe has successThreshold: {times}, which can only be 1"


def skews_are_positive(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for constraint in at(workload.pod, "topologySpreadConstraints", default=[]):
            if constraint["maxSkew"] < 1:
                where = f"{workload}: topology spread over {constraint.get('topologyKey')}"
                yield f"{where} has maxSkew: {constraint['maxSkew']}, which is 1 at least"


def names_have_servers(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if workload.pod.get("dnsPolicy") == "None" and not at(workload.pod, "dnsConfig", "nameservers"):
            yield f"{workload}: has dnsPolicy: None and no name server"


def _parts(manifests: Manifests) -> Iterator[tuple[str, str, Document]]:
    """What has words: where it is, its kind in ``WORDS``, and itself."""
    for document in manifests.documents:
        yield title(document), str(document.get("kind")), document
    for workload in manifests.workloads:
        yield str(workload), "pod", workload.pod
        for container in workload.containers:
            yield str(container), "container", container.spec
        for kind, field in (("constraint", "topologySpreadConstraints"), ("toleration", "tolerations")):
            for each in at(workload.pod, field, default=[]):
                yield f"{workload}: a {kind}", kind, each


RULES = (
    words_are_known,
    restarting_probes_succeed_once,
    skews_are_positive,
    names_have_servers,
)
