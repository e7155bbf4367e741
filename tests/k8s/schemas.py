"""Schemas of objects that Kubernetes itself does not define, made of the fields that the mesh uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema

from .checks.model import Document

Schema = dict[str, Any]


def object_(required: tuple[str, ...] = (), **properties: Any) -> Schema:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def list_(items: Schema) -> Schema:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1}


def refused(document: Document, api: str, specs: Mapping[str, Schema]) -> str | None:
    """Return the reason why an object is none of an API, whose ``specs`` are by kind; None if it is one."""
    if document["kind"] not in specs:
        return f"has no kind {document['kind']} in {api}"
    schema = object_(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api},
        kind={},
        metadata={"type": "object"},
        spec=specs[document["kind"]],
    )
    try:
        jsonschema.validate(document, schema)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(str(each) for each in error.absolute_path)}: {error.message}"
    return None
