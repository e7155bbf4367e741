"""The fields of KEDA's ScaledObject that evaluators use, as its API documents them.

https://keda.sh/docs/latest/reference/scaledobject-spec/
"""

from __future__ import annotations

from . import schemas
from .checks.model import Document, at
from .schemas import list_, object_

API = "keda.sh/v1alpha1"


_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string", "minLength": 1}
_NUMBER = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
_TRUTH = {"enum": ["true", "false"]}
_POLICY = object_(
    ("type", "value", "periodSeconds"), type={"enum": ["Percent", "Pods"]}, value=_COUNT, periodSeconds=_COUNT
)
_RULES = object_(stabilizationWindowSeconds=_COUNT, policies={"type": "array", "items": _POLICY})
_PROMETHEUS = object_(
    ("serverAddress", "query", "threshold"),
    serverAddress=_TEXT,
    query=_TEXT,
    threshold=_NUMBER,
    activationThreshold=_NUMBER,
    ignoreNullValues=_TRUTH,
)
_TRIGGERS = [
    object_(
        ("type", "metadata"),
        type={"const": "prometheus"},
        name=_TEXT,
        metricType={"const": "AverageValue"},
        metadata=_PROMETHEUS,
    ),
    object_(
        ("type", "metadata", "metricType"),
        type={"const": "cpu"},
        metricType={"const": "Utilization"},
        metadata=object_(("value",), value=_NUMBER),
    ),
]
_SPEC = object_(
    ("scaleTargetRef", "triggers"),
    scaleTargetRef=object_(("name",), apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT | {"minimum": 1},
    pollingInterval=_COUNT,
    cooldownPeriod=_COUNT,
    advanced=object_(horizontalPodAutoscalerConfig=object_(behavior=object_(scaleUp=_RULES, scaleDown=_RULES))),
    triggers=list_({"oneOf": _TRIGGERS}),
)


def refused(document: Document) -> str | None:
    """Return what KEDA refuses in one of its objects."""
    if reason := schemas.refused(document, API, {"ScaledObject": _SPEC}):
        return reason
    least, most = (at(document, "spec", f"{each}ReplicaCount") for each in ("min", "max"))
    if least is not None and most is not None and least > most:
        return f"spec.minReplicaCount: {least} is more than maxReplicaCount, {most}"
    kinds = {each["type"] for each in document["spec"]["triggers"]}
    return "spec.triggers: CPU alone starts no first pod" if least == 0 and kinds == {"cpu"} else None
