"""The fields of cert-manager's objects that the mesh uses, as its API documents them.

https://cert-manager.io/docs/reference/api-docs/
"""

from __future__ import annotations

import re
from datetime import timedelta

from . import schemas
from .checks.model import Document, at
from .schemas import list_, object_

API = "cert-manager.io/v1"

_NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
_DURATION = {"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", "minLength": 2}
_USAGES = ["digital signature", "key encipherment", "cert sign", "crl sign", "server auth", "client auth"]


_SECRET = object_(("secretName",), secretName=_NAME)
_KEY = object_(
    (),
    algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]},
    encoding={"enum": ["PKCS1", "PKCS8"]},
    rotationPolicy={"enum": ["Never", "Always"]},
    size={"type": "integer"},
)
_SPECS = {
    "Issuer": object_((), ca=_SECRET, selfSigned=object_(())) | {"minProperties": 1, "maxProperties": 1},
    "Certificate": object_(
        ("secretName", "issuerRef"),
        secretName=_NAME,
        issuerRef=object_(("name",), name=_NAME, kind={"enum": ["Issuer", "ClusterIssuer"]}, group={"type": "string"}),
        commonName={"type": "string", "minLength": 1, "maxLength": 64},
        dnsNames=list_(_NAME),
        uris=list_({"type": "string", "pattern": "^[a-z]+://"}),
        usages=list_({"enum": _USAGES}),
        isCA={"type": "boolean"},
        duration=_DURATION,
        renewBefore=_DURATION,
        privateKey=_KEY,
    ),
}


def refused(document: Document) -> str | None:
    """Return what cert-manager refuses in one of its objects."""
    if reason := schemas.refused(document, API, _SPECS):
        return reason
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
