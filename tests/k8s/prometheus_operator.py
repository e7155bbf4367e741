"""The fields of the Prometheus operator's objects that the mesh uses, as its API documents them.

https://prometheus-operator.dev/docs/api-reference/api/
"""

from __future__ import annotations

from typing import Any

import jsonschema

from .checks.model import Document

API = "monitoring.coreos.com/v1"

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": "^(0|(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?)$", "minLength": 1}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_EXPRESSION = _object(
    ("key", "operator"),
    key={"type": "string"},
    operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
    values=_list({"type": "string"}),
)
_RULE = _object(
    ("expr",),
    record={"type": "string"},
    alert={"type": "string"},
    expr={"type": ["string", "integer"]},
    labels=_TEXTS,
    annotations=_TEXTS,
) | {"oneOf": [{"required": ["record"]}, {"required": ["alert"]}]}
_RULE["properties"]["for"] = _DURATION
_SPECS = {
    "PodMonitor": _object(
        ("selector", "podMetricsEndpoints"),
        jobLabel={"type": "string"},
        selector=_object((), matchLabels=_TEXTS, matchExpressions=_list(_EXPRESSION)),
        podMetricsEndpoints=_list(_object(("port",), port={"type": "string"}, interval=_DURATION)),
    ),
    "PrometheusRule": _object(
        ("groups",),
        groups=_list(_object(("name", "rules"), name={"type": "string"}, interval=_DURATION, rules=_list(_RULE))),
    ),
}


def refused(document: Document) -> str | None:
    """Return what the operator refuses in one of its objects."""
    if document["kind"] not in _SPECS:
        return f"has no kind {document['kind']} in {API}"
    schema = _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": API},
        kind={},
        metadata={"type": "object"},
        spec=_SPECS[document["kind"]],
    )
    try:
        jsonschema.validate(document, schema)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(str(each) for each in error.absolute_path)}: {error.message}"
    return None
