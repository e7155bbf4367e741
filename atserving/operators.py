"""The operators: the entries of the file of operators and of etcd, and the file itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from atserving.errors import StartError

Key = tuple[str, ...]
"""Tells who somebody is: a kind of proof, and what it names."""

_NAME = "[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}"
Name = Annotated[str, Meta(pattern=rf"^{_NAME}\Z")]
_Pattern = Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62}\*?|\*)\Z")]
_Text = Annotated[str, Meta(min_length=1, max_length=500)]
_MayBeEmpty = Annotated[str, Meta(max_length=500)]

Role = Literal["viewer", "publisher", "admin"]
_WAYS = ("token_sha256", "certificate", "subject", "group")


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A person, a program such as a pipeline, or a group of them."""

    name: Name
    role: Role = "viewer"
    apps: Annotated[tuple[_Pattern, ...], Meta(max_length=1000)] = ()
    """The apps of a publisher, by name; ``team-*`` stands for all names with this beginning."""
    token_sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    certificate: Annotated[str, Meta(pattern=r"^([a-z][a-z0-9+.-]*:[!-~]+)?\Z", max_length=500)] = ""
    """A URI in the SAN of a certificate."""
    issuer: Annotated[str, Meta(pattern=rf"^({_NAME})?\Z")] = ""
    """The name of an issuer of the file, whose tokens name ``subject`` or ``group``."""
    subject: _MayBeEmpty = ""
    group: _MayBeEmpty = ""

    def __post_init__(self) -> None:
        """Raise ValueError for fields that contradict each other."""
        ways = [name for name in _WAYS if getattr(self, name)]
        if len(ways) != 1:
            raise ValueError(f"should have one of {', '.join(_WAYS)}, not {' and '.join(ways) or 'none'}")
        if bool(self.issuer) != (ways[0] in ("subject", "group")):
            raise ValueError("issuer goes with subject or group, and only with these")
        if (self.role == "publisher") != bool(self.apps):
            raise ValueError("a publisher has apps, and nobody else")

    @property
    def key(self) -> Key:
        """The proof that tells this operator apart."""
        if self.token_sha256:
            return of_token(self.token_sha256)
        if self.certificate:
            return of_certificate(self.certificate)
        return of_subject(self.issuer, self.subject) if self.subject else of_group(self.issuer, self.group)

    def may_change(self, app: str) -> bool:
        """Return whether the operator may change the config of an app; of what all apps share, if it is empty."""
        if self.role != "publisher":
            return self.role == "admin"
        return bool(app) and any(app.startswith(each[:-1]) if each.endswith("*") else app == each for each in self.apps)

    def shown(self) -> dict[str, Any]:
        """Return the fields that have a value, without the digest of its token."""
        found: dict[str, Any] = {name: each for name, each in msgspec.structs.asdict(self).items() if each}
        found.pop("token_sha256", None)
        return found

    def to_json(self) -> str:
        """Return the operator as JSON for etcd."""
        token = {"token_sha256": self.token_sha256} if self.token_sha256 else {}
        return msgspec.json.encode({**self.shown(), **token}).decode()


class Issuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody whose tokens count: an OpenID provider, or another issuer of JWTs."""

    name: Name
    issuer: _Text
    """The claim ``iss`` of its tokens."""
    audience: _Text
    """A value of the claim ``aud``: tokens for others do not count."""
    jwks: _Text
    """Its public keys: the URL of a JSON Web Key Set, or a file. Relative paths begin at the folder of this file."""
    ca: str = ""
    """The authorities to trust with the URL (PEM); empty: the system's."""
    subject_claim: _Text = "sub"
    groups_claim: _Text = "groups"

    def __post_init__(self) -> None:
        """Raise ValueError if the keys would come over plain text."""
        if "://" in self.jwks and not self.jwks.startswith("https://"):
            raise ValueError("jwks should be an https:// URL, or a file")


class OperatorFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of ``--operators``."""

    operators: tuple[Operator, ...] = ()
    issuers: tuple[Issuer, ...] = ()


def of_token(digest: str) -> Key:
    return ("token", digest)


def of_certificate(uri: str) -> Key:
    return ("certificate", uri)


def of_subject(issuer: str, subject: str) -> Key:
    return ("subject", issuer, subject)


def of_group(issuer: str, group: str) -> Key:
    return ("group", issuer, group)


def read_file(path: Path) -> OperatorFile:
    """Read the file of operators. Raises StartError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StartError(f"can't read {path} for --operators: {error.strerror}") from None
    return parse_file(path, text)


def parse_file(path: Path, text: bytes) -> OperatorFile:
    """Read what a file of operators has, or is to have. Raises StartError."""
    try:
        found = msgspec.json.decode(text, type=OperatorFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StartError(f"{path}: {error}") from None
    _check_unique(path, "operators have the same name", (each.name for each in found.operators))
    _check_unique(
        path, "operators have the same token, certificate, subject or group", (each.key for each in found.operators)
    )
    _check_unique(path, "issuers have the same name", (each.name for each in found.issuers))
    _check_unique(path, "issuers have the same issuer", (each.issuer for each in found.issuers))
    names = {each.name for each in found.issuers}
    for each in found.operators:
        if each.issuer and each.issuer not in names:
            raise StartError(f"{path}: operator {each.name!r}: there is no issuer {each.issuer!r} in the file")
    return found


def _check_unique(path: Path, wrong: str, found: Iterable[object]) -> None:
    values = list(found)
    if len(set(values)) < len(values):
        raise StartError(f"{path}: two {wrong}")
