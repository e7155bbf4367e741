"""Publishing releases. Every write reads the key from etcd first, and fails if the key changes in between."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from atserving.config import ACCEPT_KEY, MUTABLE, Acceptance, MalformedConfig, Phase, Release, parse, release_key
from atserving.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from atserving.v1 import etcd_pb2
from registry.etcd import EtcdClient, put, written_at

log = structlog.get_logger()

ACCEPT_S = 60
"""How long an operator's word counts that accepts deletions."""

_ATTEMPTS = 4
_SHA256 = re.compile(r"#sha256=(?![0-9A-Fa-f]{64}$)")


@dataclass(frozen=True)
class Stored:
    """A release as stored in etcd, and the revision of its last write."""

    release: Release
    revision: int


class Releases:
    """Writes the releases in etcd."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client

    async def publish(self, release: Release, given: Collection[str]) -> Stored:
        """Write a new release. If the version exists, update only its phase, desc and weight, where they are ``given``.

        Raises AlreadyExists if the version exists with other content, InvalidArgument, Unavailable, EtcdError.
        """
        _check_digests(release)
        for _ in range(_ATTEMPTS):
            kv = await self._client.get(release.key)
            if kv is None:
                new = msgspec.structs.replace(release, lastmodified=_now())
                stored = await self._write(release.key, 0, new.to_json())
            else:
                stored = await self._amend(kv, _amendment(kv, release, given))
            if stored:
                return stored
        raise _contended(release.name, release.version)

    async def set_phase(self, app: str, version: str, phase: Phase) -> Stored:
        """Move a release to a phase. Raises NotFound, InvalidArgument, Unavailable, EtcdError."""
        key = release_key(app, version)
        for _ in range(_ATTEMPTS):
            kv = await self._client.get(key)
            if kv is None:
                raise NotFound(f"release {app}/{version} is not published")
            stored = await self._amend(kv, {"phase": phase})
            if stored:
                return stored
        raise _contended(app, version)

    async def accept_deletions(self) -> int:
        """Let every registry and gate take the deletions that it holds back; return the revision. Raises EtcdError."""
        lease = await self._client.grant(ACCEPT_S)
        revision = await self._client.put(ACCEPT_KEY, Acceptance().to_json(), lease.id)
        log.warning("deletions accepted", revision=revision)
        return revision

    async def _amend(self, kv: etcd_pb2.KeyValue, changes: Mapping[str, Any]) -> Stored | None:
        current = _read(kv)
        if all(getattr(current, field) == value for field, value in changes.items()):
            return Stored(current, kv.mod_revision)
        # Change the stored JSON, not the parsed release: an operator may have added fields of their own.
        fields = json.loads(kv.value) | changes | {"lastmodified": _now()}
        value = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        return await self._write(kv.key.decode(), kv.mod_revision, value)

    async def _write(self, key: str, mod_revision: int, value: str) -> Stored | None:
        try:
            release = parse(key, value.encode())
        except MalformedConfig as error:
            raise InvalidArgument(f"release: {error}") from None
        assert isinstance(release, Release)
        revision = await self._client.commit([written_at(key, mod_revision)], [put(key, value)])
        if revision is None:
            return None
        log.info("release written", app=release.name, version=release.version, phase=release.phase, revision=revision)
        return Stored(release, revision)


def _amendment(kv: etcd_pb2.KeyValue, release: Release, given: Collection[str]) -> dict[str, Any]:
    """Return the changes from the stored release to ``release``. Raises AlreadyExists if an immutable field differs."""
    current = _read(kv)
    if different := current.differing(release):
        which = f"{release.name}/{release.version}"
        raise AlreadyExists(f"release {which} exists with a different {', '.join(different)}: publish a new version")
    return {field: getattr(release, field) for field in MUTABLE if field in given}


def _read(kv: etcd_pb2.KeyValue) -> Release:
    key = kv.key.decode()
    try:
        release = parse(key, kv.value)
    except MalformedConfig as error:
        raise InvalidArgument(
            f"the value of {key} in etcd is malformed ({error}): correct or delete it with etcdctl"
        ) from None
    assert isinstance(release, Release)
    return release


def _check_digests(release: Release) -> None:
    files = {"file": release.file} | {f"custom_files.{name}": uri for name, uri in release.custom_files.items()}
    for field, uri in files.items():
        if _SHA256.search(uri):
            raise InvalidArgument(f"release.{field}: #sha256= should be followed by 64 hexadecimal digits")


def _contended(app: str, version: str) -> Unavailable:
    return Unavailable(f"release {app}/{version} keeps changing in etcd: try again")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
