"""The fields of KEDA's ScaledObject that evaluators use, as its API documents them.

https://keda.sh/docs/latest/reference/scaledobject-spec/
"""

from __future__ import annotations

from typing import Any

import jsonschema

from .checks.model import Document, at

API = "keda.sh/v1alpha1"


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string", "minLength": 1}
_NUMBER = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
_TRUTH = {"enum": ["true", "false"]}
_POLICY = _object(
    "type", "value", "periodSeconds", type={"enum": ["Percent", "Pods"]}, value=_COUNT, periodSeconds=_COUNT
)
_RULES = _object(stabilizationWindowSeconds=_COUNT, policies={"type": "array", "items": _POLICY})
_PROMETHEUS = _object(
    "serverAddress",
    "query",
    "threshold",
    serverAddress=_TEXT,
    query=_TEXT,
    threshold=_NUMBER,
    activationThreshold=_NUMBER,
    ignoreNullValues=_TRUTH,
)
_TRIGGERS = [
    _object(
        "type",
        "metadata",
        type={"const": "prometheus"},
        name=_TEXT,
        metricType={"const": "AverageValue"},
        metadata=_PROMETHEUS,
    ),
    _object(
        "type",
        "metadata",
        "metricType",
        type={"const": "cpu"},
        metricType={"const": "Utilization"},
        metadata=_object("value", value=_NUMBER),
    ),
]
_SPEC = _object(
    "scaleTargetRef",
    "triggers",
    scaleTargetRef=_object("name", apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT | {"minimum": 1},
    pollingInterval=_COUNT,
    cooldownPeriod=_COUNT,
    advanced=_object(horizontalPodAutoscalerConfig=_object(behavior=_object(scaleUp=_RULES, scaleDown=_RULES))),
    triggers={"type": "array", "minItems": 1, "items": {"oneOf": _TRIGGERS}},
)
_SCHEMA = _object(
    *("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": API},
    kind={"const": "ScaledObject"},
    metadata={"type": "object"},
    spec=_SPEC,
)


def refused(document: Document) -> str | None:
    """Return what KEDA refuses in one of its objects."""
    try:
        jsonschema.validate(document, _SCHEMA)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(str(each) for each in error.absolute_path)}: {error.message}"
    least, most = (at(document, "spec", f"{each}ReplicaCount") for each in ("min", "max"))
    if least is not None and most is not None and least > most:
        return f"spec.minReplicaCount: {least} is more than maxReplicaCount, {most}"
    kinds = {each["type"] for each in document["spec"]["triggers"]}
    return "spec.triggers: CPU alone starts no first pod" if least == 0 and kinds == {"cpu"} else None
