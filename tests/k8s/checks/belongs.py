"""Which mesh, component and namespace does each part belong to?"""

from __future__ import annotations

from collections.abc import Iterator

from .model import COMPONENT, COMPONENTS, Document, Manifests, at, dict_at, title

KINDS = (
    "Certificate",
    "ConfigMap",
    "Deployment",
    "HorizontalPodAutoscaler",
    "Issuer",
    "Namespace",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "Secret",
    "Service",
    "ServiceAccount",
    "StatefulSet",
)
"""The kinds that the rules read."""

UNREAD: dict[str, tuple[str, ...]] = {
    "pod": ("initContainers",),
    "container": ("envFrom",),
    "mount": ("subPath", "subPathExpr"),
}
"""Fields that the mesh does not use and no rule reads. Before you use one, teach the rules to read it."""

NAME = "app.kubernetes.io/name"
PART_OF = "app.kubernetes.io/part-of"


def every_part_is_read(manifests: Manifests) -> Iterator[str]:
    """The rules would let a part that they do not know through unread."""
    for document in manifests.documents:
        if document.get("kind") not in KINDS:
            yield f"{title(document)}: no rule reads a {document.get('kind')}"
    for where, kind, part in _parts(manifests):
        for field in UNREAD[kind]:
            if part.get(field):
                yield f"{where}: no rule reads {field}"


def everything_is_in_one_namespace(manifests: Manifests) -> Iterator[str]:
    namespaces = [at(each, "metadata", "name") for each in manifests.of("Namespace")]
    if len(namespaces) != 1:
        yield f"there should be one Namespace, not {len(namespaces)}"
    for document in manifests.documents:
        namespace = at(document, "metadata", "namespace")
        if document.get("kind") != "Namespace" and namespace not in namespaces:
            yield f"{title(document)}: is in namespace {namespace!r}, which is not among the manifests"


def workloads_have_the_mesh_labels(manifests: Manifests) -> Iterator[str]:
    """NetworkPolicies, Services and the playbook's commands select by these labels."""
    for workload in manifests.workloads:
        own = dict_at(workload.document, "metadata", "labels")
        for labels, owner in ((own, "it"), (workload.labels, "its pod template")):
            wanted = [NAME, COMPONENT, PART_OF]
            if labels.get(COMPONENT) == "evaluator":
                wanted += ["atserving/app", "atserving/version"]
            for key in wanted:
                if key not in labels:
                    yield f"{workload}: {owner} has no label {key}"
            if labels.get(COMPONENT, COMPONENTS[0]) not in COMPONENTS:
                yield f"{workload}: {owner} has an unknown component {labels[COMPONENT]!r}"
            if labels.get(PART_OF, "atserving") != "atserving":
                yield f"{workload}: {owner} is part of {labels[PART_OF]!r}, should be 'atserving'"


def selectors_match_no_other_pods(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for other in manifests.selected(workload.selector):
            if other is not workload:
                yield f"{workload}: its selector matches the pods of {other} too"


def _parts(manifests: Manifests) -> Iterator[tuple[str, str, Document]]:
    """The parts of pods: the place that a message names, the kind in ``UNREAD``, and the part."""
    for workload in manifests.workloads:
        yield str(workload), "pod", workload.pod
    for _, container in manifests.containers:
        yield str(container), "container", container.spec
        for mount in container.mounts:
            yield f"{container}: mount {mount['mountPath']}", "mount", mount


RULES = (
    every_part_is_read,
    everything_is_in_one_namespace,
    workloads_have_the_mesh_labels,
    selectors_match_no_other_pods,
)
