"""The fields of cert-manager's objects that the mesh uses, as its API documents them.

https://cert-manager.io/docs/reference/api-docs/
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import jsonschema

from .checks.model import Document, at

API = "cert-manager.io/v1"

_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
_DURATION = {"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", "minLength": 2}
_USAGES = ["digital signature", "key encipherment", "cert sign", "crl sign", "server auth", "client auth"]


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_SECRET = _object(("secretName",), secretName=_NAME)
_KEY = _object(
    (),
    algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]},
    encoding={"enum": ["PKCS1", "PKCS8"]},
    rotationPolicy={"enum": ["Never", "Always"]},
    size={"type": "integer"},
)
_SPECS = {
    "Issuer": _object((), ca=_SECRET, selfSigned=_object(())) | {"minProperties": 1, "maxProperties": 1},
    "Certificate": _object(
        ("secretName", "issuerRef"),
        secretName=_NAME,
        issuerRef=_object(("name",), name=_NAME, kind={"enum": ["Issuer", "ClusterIssuer"]}, group={"type": "string"}),
        commonName={"type": "string", "minLength": 1, "maxLength": 64},
        dnsNames=_list(_NAME),
        uris=_list({"type": "string", "pattern": "^[a-z]+://"}),
        usages=_list({"enum": _USAGES}),
        isCA={"type": "boolean"},
        duration=_DURATION,
        renewBefore=_DURATION,
        privateKey=_KEY,
    ),
}


def refused(document: Document) -> str | None:
    """Return what cert-manager refuses in one of its objects."""
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
    duration, before = (_time(at(document, "spec", each)) for each in ("duration", "renewBefore"))
    if duration is not None and duration < timedelta(hours=1):
        return f"spec.duration: {duration} is less than an hour"
    if duration is not None and before is not None and not timedelta(minutes=5) <= before < duration:
        return f"spec.renewBefore: {before} is not between 5 minutes and the duration, {duration}"
    return None


def _time(text: str | None) -> timedelta | None:
    if text is None:
        return None
    found = {unit: int(number) for number, unit in re.findall(r"(\d+)([hms])", text)}
    return timedelta(hours=found.get("h", 0), minutes=found.get("m", 0), seconds=found.get("s", 0))
