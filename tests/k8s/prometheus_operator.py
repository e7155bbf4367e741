"""The fields of the Prometheus operator's objects that the mesh uses, as its API documents them.

https://prometheus-operator.dev/docs/api-reference/api/
"""

from __future__ import annotations

from . import schemas
from .checks.model import Document
from .schemas import list_, object_

API = "monitoring.coreos.com/v1"

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": "^(0|(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?)$", "minLength": 1}


_EXPRESSION = object_(
    ("key", "operator"),
    key={"type": "string"},
    operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
    values=list_({"type": "string"}),
)
_RULE = object_(
    ("expr",),
    record={"type": "string"},
    alert={"type": "string"},
    expr={"type": ["string", "integer"]},
    labels=_TEXTS,
    annotations=_TEXTS,
) | {"oneOf": [{"required": ["record"]}, {"required": ["alert"]}]}
_RULE["properties"]["for"] = _DURATION
_SPECS = {
    "PodMonitor": object_(
        ("selector", "podMetricsEndpoints"),
        jobLabel={"type": "string"},
        selector=object_((), matchLabels=_TEXTS, matchExpressions=list_(_EXPRESSION)),
        podMetricsEndpoints=list_(object_(("port",), port={"type": "string"}, interval=_DURATION)),
    ),
    "PrometheusRule": object_(
        ("groups",),
        groups=list_(object_(("name", "rules"), name={"type": "string"}, interval=_DURATION, rules=list_(_RULE))),
    ),
}


def refused(document: Document) -> str | None:
    """Return what the operator refuses in one of its objects."""
    return schemas.refused(document, API, _SPECS)
