"""The objects that the rules read: workloads, their containers, and label selectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Document = dict[str, Any]

COMPONENTS = ("gate", "registry", "envoy", "etcd", "evaluator")
COMPONENT = "app.kubernetes.io/component"
WORKLOADS = ("Deployment", "StatefulSet")

_TARGET = ("spec", "scaleTargetRef")


def at(value: Any, *path: str, default: Any = None) -> Any:
    """Return the value at a path of fields, or ``default`` where a field is absent or null."""
    for field in path:
        value = value.get(field) if isinstance(value, dict) else None
    return default if value is None else value


def list_at(value: Any, *path: str) -> list[Any]:
    """Return the list at a path of fields; empty where it is absent."""
    found: list[Any] = at(value, *path, default=[])
    return found


def dict_at(value: Any, *path: str) -> Document:
    """Return the object at a path of fields; empty where it is absent."""
    found: Document = at(value, *path, default={})
    return found


def title(document: Document) -> str:
    """Return a document's name in messages: ``Deployment/gate``."""
    return f"{document.get('kind')}/{at(document, 'metadata', 'name')}"


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a LabelSelector selects an object with these labels. An empty selector selects everything."""
    return all(labels.get(key) == value for key, value in dict_at(selector, "matchLabels").items()) and all(
        _meets(each, labels) for each in list_at(selector, "matchExpressions")
    )


def _meets(expression: Document, labels: dict[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or []
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case _:
            return key not in labels


@dataclass(frozen=True)
class Container:
    """A container of a workload's pods."""

    workload: str
    spec: Document

    def __str__(self) -> str:
        return f"{self.workload}: container {self.spec['name']!r}"

    @property
    def ports(self) -> list[Document]:
        return list_at(self.spec, "ports")

    @property
    def words(self) -> list[str]:
        """Its command line."""
        return [str(each) for part in ("command", "args") for each in list_at(self.spec, part)]

    @property
    def variables(self) -> list[Document]:
        return list_at(self.spec, "env")

    @property
    def mounts(self) -> list[Document]:
        return list_at(self.spec, "volumeMounts")

    def number(self, port: str | int, protocol: str = "TCP") -> int | None:
        """Return the number of a declared port, given its name or its number."""
        for each in self.ports:
            if port in (each.get("name"), each["containerPort"]) and protocol == each.get("protocol", "TCP"):
                return int(each["containerPort"])
        return None

    def flag(self, name: str, prefix: str = "ATSERVING") -> str | None:
        """Return the value of ``--name``, or else of the variable ``<prefix>_<NAME>`` that stands for it."""
        for word, following in zip(self.words, [*self.words[1:], ""], strict=False):
            if word == f"--{name}":
                return following
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
        variable = f"{prefix}_{name.upper().replace('-', '_')}"
        values = [each.get("value") for each in self.variables if each["name"] == variable]
        return values[-1] if values else None


@dataclass(frozen=True, eq=False)
class Workload:
    """A Deployment or StatefulSet and the pods that it makes."""

    document: Document

    def __str__(self) -> str:
        return title(self.document)

    @property
    def name(self) -> str:
        return str(at(self.document, "metadata", "name"))

    @property
    def kind(self) -> str:
        return str(self.document["kind"])

    @property
    def selector(self) -> Document:
        return dict_at(self.document, "spec", "selector")

    @cached_property
    def labels(self) -> dict[str, str]:
        """The labels of its pods."""
        return dict_at(self.document, "spec", "template", "metadata", "labels")

    @cached_property
    def annotations(self) -> dict[str, str]:
        """The annotations of its pods."""
        return dict_at(self.document, "spec", "template", "metadata", "annotations")

    @cached_property
    def component(self) -> str | None:
        return self.labels.get(COMPONENT)

    @cached_property
    def pod(self) -> Document:
        """The spec of its pods."""
        return dict_at(self.document, "spec", "template", "spec")

    @property
    def volumes(self) -> list[Document]:
        return list_at(self.pod, "volumes")

    @property
    def claims(self) -> set[str]:
        """The names of the volumes that a StatefulSet claims for each pod."""
        claims = list_at(self.document, "spec", "volumeClaimTemplates")
        return {str(at(each, "metadata", "name")) for each in claims}

    @cached_property
    def containers(self) -> list[Container]:
        return [Container(str(self), each) for each in list_at(self.pod, "containers")]

    def number(self, port: str | int, protocol: str = "TCP") -> int | None:
        """Return the number of a port that its pods declare, given its name or its number."""
        return next((found for each in self.containers if (found := each.number(port, protocol)) is not None), None)


class Manifests:
    """The documents of one mesh."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.workloads = [Workload(each) for each in documents if each.get("kind") in WORKLOADS]

    @property
    def containers(self) -> Iterator[tuple[Workload, Container]]:
        """All containers, each with its workload."""
        return ((workload, container) for workload in self.workloads for container in workload.containers)

    def of(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each.get("kind") == kind]

    def find(self, kind: str, name: str) -> Document | None:
        return next((each for each in self.of(kind) if at(each, "metadata", "name") == name), None)

    def selected(self, selector: Document) -> list[Workload]:
        """Return the workloads whose pods a LabelSelector selects."""
        return [each for each in self.workloads if selects(selector, each.labels)]

    def behind(self, service: Document) -> list[Workload]:
        """Return the workloads whose pods a Service leads to."""
        selector = at(service, "spec", "selector")
        if not selector or at(service, "spec", "type") == "ExternalName":
            return []
        return self.selected({"matchLabels": selector})

    def all_scalers(self) -> list[Document]:
        """Return the HorizontalPodAutoscalers and KEDA's ScaledObjects."""
        return [*self.of("HorizontalPodAutoscaler"), *self.of("ScaledObject")]

    def scalers(self, workload: Workload) -> list[Document]:
        """Return the autoscalers of a workload."""
        wanted = (workload.kind, workload.name)
        return [
            each for each in self.all_scalers() if wanted == (at(each, *_TARGET, "kind"), at(each, *_TARGET, "name"))
        ]

    def replicas(self, workload: Workload) -> int:
        """Return the least number of pods that a workload runs."""
        for scaler in self.scalers(workload):
            least = "minReplicas" if scaler["kind"] == "HorizontalPodAutoscaler" else "minReplicaCount"
            return int(at(scaler, "spec", least, default=1))
        return int(at(workload.document, "spec", "replicas", default=1))
