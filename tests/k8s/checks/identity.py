"""Rules of kinds, names, namespaces, labels, and the selectors of workloads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .model import COMPONENT, COMPONENTS, Document, Manifests, at, selects, title

# What the other rules know. A kind that they don't would be let through unread.
KINDS = (
    "ConfigMap",
    "Deployment",
    "HorizontalPodAutoscaler",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "Secret",
    "Service",
    "ServiceAccount",
    "StatefulSet",
)
NAME = "app.kubernetes.io/name"
PART_OF = "app.kubernetes.io/part-of"

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
# Pods are named after these, and a pod's name is its host name.
_LABEL_KINDS = ("Namespace", "Service", "StatefulSet")
LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"


def kinds_are_known(manifests: Manifests) -> Iterator[str]:
    for document in manifests.documents:
        if document.get("kind") not in KINDS:
            yield f"{title(document)}: no rule reads a {document.get('kind')}"


def names_are_unique(manifests: Manifests) -> Iterator[str]:
    for name, times in Counter(title(each) for each in manifests.documents).items():
        if times > 1:
            yield f"{name}: is there {times} times"


def names_are_valid(manifests: Manifests) -> Iterator[str]:
    """As RFC 1123 has it, which the server asks for and the schema does not."""
    for document in manifests.documents:
        name = str(at(document, "metadata", "name"))
        pattern = _DNS_LABEL if document.get("kind") in _LABEL_KINDS else rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
        if not re.fullmatch(pattern, name) or len(name) > 253:
            yield f"{title(document)}: is no DNS name"
        labels = at(document, "metadata", "labels", default={}) | at(
            document, "spec", "template", "metadata", "labels", default={}
        )
        for key, value in labels.items():
            if not re.fullmatch(LABEL_VALUE, str(value)):
                yield f"{title(document)}: label {key} can't be {value!r}"


def one_namespace(manifests: Manifests) -> Iterator[str]:
    namespaces = [at(each, "metadata", "name") for each in manifests.of("Namespace")]
    if len(namespaces) != 1:
        yield f"there should be one Namespace, not {len(namespaces)}"
    for document in manifests.documents:
        namespace = at(document, "metadata", "namespace")
        if document.get("kind") != "Namespace" and namespace not in namespaces:
            yield f"{title(document)}: is in namespace {namespace!r}, which is not among the manifests"


def workloads_are_labelled(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        own = at(workload.document, "metadata", "labels", default={})
        for labels, whose in ((own, "it"), (workload.labels, "its pod template")):
            wanted = [NAME, COMPONENT, PART_OF]
            if labels.get(COMPONENT) == "evaluator":
                wanted += ["atserving/app", "atserving/version"]
            for key in wanted:
                if key not in labels:
                    yield f"{workload}: {whose} has no label {key}"
            if labels.get(COMPONENT, COMPONENTS[0]) not in COMPONENTS:
                yield f"{workload}: {whose} has an unknown component {labels[COMPONENT]!r}"
            if labels.get(PART_OF, "atserving") != "atserving":
                yield f"{workload}: {whose} is part of {labels[PART_OF]!r}, should be 'atserving'"


def selectors_match_own_pods(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        if not selects(workload.selector, workload.labels):
            yield f"{workload}: its selector does not match the labels of its pod template"


def selectors_match_no_other_pods(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for other in manifests.selected(workload.selector):
            if other is not workload:
                yield f"{workload}: its selector matches the pods of {other} too"


def spread_selects_own_pods(manifests: Manifests) -> Iterator[str]:
    for workload in manifests.workloads:
        for constraint in at(workload.pod, "topologySpreadConstraints", default=[]):
            where = f"{workload}: topology spread over {constraint.get('topologyKey')}"
            selector: Document = at(constraint, "labelSelector", default={})
            if not selector or not selects(selector, workload.labels):
                yield f"{where} does not select its own pods"
            elif any(other is not workload for other in manifests.selected(selector)):
                yield f"{where} counts the pods of other workloads too"


RULES = (
    kinds_are_known,
    names_are_unique,
    names_are_valid,
    one_namespace,
    workloads_are_labelled,
    selectors_match_own_pods,
    selectors_match_no_other_pods,
    spread_selects_own_pods,
)
