"""What the rules read: workloads, their pods' containers, label selectors and quantities, out of manifests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

Document = dict[str, Any]

COMPONENTS = ("gate", "registry", "envoy", "etcd", "evaluator")
COMPONENT = "app.kubernetes.io/component"
WORKLOADS = ("Deployment", "StatefulSet")

_TARGET = ("spec", "scaleTargetRef")

_EXPONENTS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_POWERS = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:e([+-]?\d+)|([numkMGTPE]?|[KMGTPE]i))")


def at(value: Any, *path: str, default: Any = None) -> Any:
    """What is at a path of fields; ``default`` where it, or a field before it, is absent or null."""
    for field in path:
        value = value.get(field) if isinstance(value, dict) else None
    return default if value is None else value


def title(document: Document) -> str:
    """As messages name a document: ``Deployment/gate``."""
    return f"{document.get('kind')}/{at(document, 'metadata', 'name')}"


def quantity(value: str | int | float) -> Decimal:
    """A quantity of a resource, such as ``500m`` or ``1Gi``, in its unit. Raises ValueError.

    The grammar is that of ``k8s.io/apimachinery/pkg/api/resource``.
    """
    match = _QUANTITY.fullmatch(str(value))
    if not match:
        raise ValueError(f"{value!r} is no quantity")
    number, exponent, suffix = match.groups()
    if suffix in _POWERS:
        return Decimal(number) * 1024 ** _POWERS[suffix]
    return Decimal(number).scaleb(int(exponent) if exponent else _EXPONENTS[suffix or ""])


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a LabelSelector selects what has these labels; an empty one selects all."""
    return all(labels.get(key) == value for key, value in at(selector, "matchLabels", default={}).items()) and all(
        _meets(each, labels) for each in at(selector, "matchExpressions", default=[])
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


def number_of(value: int | str, whole: int) -> int:
    """A number, or a percentage of ``whole`` rounded up, as disruption budgets count."""
    return -(-whole * int(value.removesuffix("%")) // 100) if isinstance(value, str) else value


@dataclass(frozen=True)
class Container:
    """A container of a workload's pods, and how messages name it."""

    workload: str
    spec: Document

    def __str__(self) -> str:
        return f"{self.workload}: container {self.spec['name']!r}"

    @property
    def ports(self) -> list[Document]:
        return at(self.spec, "ports", default=[])

    def declares(self, port: str | int, protocol: str = "TCP") -> bool:
        """Whether a port, by its name or its number, is among those it declares."""
        return self.number(port, protocol) is not None

    def number(self, port: str | int, protocol: str = "TCP") -> int | None:
        """The number of a port that it declares, given its name or its number."""
        for each in self.ports:
            if port in (each.get("name"), each["containerPort"]) and protocol == each.get("protocol", "TCP"):
                return int(each["containerPort"])
        return None

    def flag(self, name: str, prefix: str = "ATSERVING") -> str | None:
        """The value of ``--name`` in its arguments, or else of the variable ``<prefix>_<NAME>`` that stands for it."""
        words = [*at(self.spec, "command", default=[]), *at(self.spec, "args", default=[])]
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word == f"--{name}":
                return str(following)
            if word.startswith(f"--{name}="):
                return str(word.partition("=")[2])
        variable = f"{prefix}_{name.upper().replace('-', '_')}"
        values = [each.get("value") for each in at(self.spec, "env", default=[]) if each["name"] == variable]
        return values[-1] if values else None


@dataclass(frozen=True, eq=False)
class Workload:
    """A Deployment or StatefulSet and the pods it makes."""

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
        return at(self.document, "spec", "selector", default={})

    @property
    def labels(self) -> dict[str, str]:
        """The labels of its pods."""
        return at(self.document, "spec", "template", "metadata", "labels", default={})

    @property
    def annotations(self) -> dict[str, str]:
        """The annotations of its pods."""
        return at(self.document, "spec", "template", "metadata", "annotations", default={})

    @property
    def component(self) -> str | None:
        return self.labels.get(COMPONENT)

    @property
    def pod(self) -> Document:
        """The spec of its pods."""
        return at(self.document, "spec", "template", "spec", default={})

    @property
    def volumes(self) -> list[Document]:
        return at(self.pod, "volumes", default=[])

    @property
    def claims(self) -> list[Document]:
        """The claims that a StatefulSet makes for each pod."""
        return at(self.document, "spec", "volumeClaimTemplates", default=[])

    @cached_property
    def containers(self) -> list[Container]:
        """All of a pod's containers, those that run before the others included."""
        return [Container(str(self), each) for each in (*at(self.pod, "initContainers", default=[]), *self._main)]

    @cached_property
    def lasting(self) -> list[Container]:
        """The containers that run as long as the pod does."""
        before = at(self.pod, "initContainers", default=[])
        sidecars = [each for each in before if each.get("restartPolicy") == "Always"]
        return [Container(str(self), each) for each in (*sidecars, *self._main)]

    @property
    def _main(self) -> list[Document]:
        return at(self.pod, "containers", default=[])

    def number(self, port: str | int, protocol: str = "TCP") -> int | None:
        """The number of a port that its pods listen on, given its name or its number."""
        return next((found for each in self.lasting if (found := each.number(port, protocol)) is not None), None)


class Manifests:
    """The documents of one mesh."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.workloads = [Workload(each) for each in documents if each.get("kind") in WORKLOADS]

    def of(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each.get("kind") == kind]

    def find(self, kind: str, name: str) -> Document | None:
        return next((each for each in self.of(kind) if at(each, "metadata", "name") == name), None)

    def selected(self, selector: Document) -> list[Workload]:
        """The workloads whose pods a LabelSelector selects."""
        return [each for each in self.workloads if selects(selector, each.labels)]

    def scalers(self, workload: Workload) -> list[Document]:
        """The HorizontalPodAutoscalers of a workload."""
        wanted = (workload.kind, workload.name)
        scalers = self.of("HorizontalPodAutoscaler")
        return [each for each in scalers if wanted == (at(each, *_TARGET, "kind"), at(each, *_TARGET, "name"))]

    def replicas(self, workload: Workload) -> int:
        """How many pods a workload has at least."""
        for scaler in self.scalers(workload):
            return int(at(scaler, "spec", "minReplicas", default=1))
        return int(at(workload.document, "spec", "replicas", default=1))
