"""Registered instances: keys under leases, which etcd deletes when an instance stops sending heartbeats.

A registry keeps no state of an instance. The key in etcd holds its lease, so each call may reach another registry.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import structlog

from atserving.config import Instance, MalformedConfig, Release, instance_key, parse, release_key
from atserving.errors import FailedPrecondition, NotFound, Unavailable
from atserving.v1 import etcd_pb2
from registry.etcd import EtcdClient, Lease, LeaseNotFound, delete, put, unwritten_since, written_at
from registry.view import View

log = structlog.get_logger()

_ATTEMPTS = 4


class Instances:
    """Registers instances under leases of ``ttl_s`` seconds.

    Most heartbeats find in the view what etcd has, and only renew the lease.
    """

    def __init__(self, client: EtcdClient, ttl_s: int, view: View) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._view = view
        self.counts: Counter[str] = Counter()
        """How many instances were ``registered``, ``renewed`` and ``deregistered`` here."""

    async def register(self, instance: Instance) -> int:
        """Register an instance or renew its lease; return the lease's time to live in seconds.

        Raises NotFound if the release is not published, FailedPrecondition if another instance has loaded other files
        of it, Unavailable if other writers win every attempt, EtcdError.
        """
        if ttl_s := await self._renewed_as_known(instance):
            self.counts["renewed"] += 1
            return ttl_s
        for _ in range(_ATTEMPTS):
            release, stored = await self._client.get_all(release_key(instance.app, instance.version), instance.key)
            if release is None:
                raise NotFound(f"release {instance.app}/{instance.version} is not published")
            beside = await self._beside(instance, release)
            lease = await self._renewed(stored) if stored and stored.lease else None
            if lease and stored and _matches(stored, instance):
                self.counts["renewed"] += 1
                return lease.ttl_s
            lease = lease or await self._client.grant(self._ttl_s)
            if await self._put(instance, release, stored, lease, beside):
                self.counts["registered"] += 1
                log.info(
                    "instance registered",
                    instance=instance.id,
                    app=instance.app,
                    version=instance.version,
                    address=instance.address,
                    capacity=instance.capacity,
                )
                _check_content(instance, release)
                return lease.ttl_s
        raise Unavailable(
            f"instance {instance.id} of {instance.app}/{instance.version} keeps changing in etcd: try again"
        )

    async def _renewed_as_known(self, instance: Instance) -> int:
        """Renew the lease of an instance that the view knows as it is; return its time to live, 0 if it does not."""
        view = self._view
        entry = view.entries.get(instance.key)
        if view.stale or entry is None or not entry.lease or entry.value != instance or view.holdback.held:
            return 0
        if release_key(instance.app, instance.version) not in view.entries:
            return 0
        try:
            return await self._client.keep_alive(entry.lease)
        except LeaseNotFound:
            return 0

    async def _beside(self, instance: Instance, stored: etcd_pb2.KeyValue) -> list[etcd_pb2.Compare]:
        """Return the condition under which no other instance has loaded other files of the release.

        Files without a digest in the release may be replaced. Raises FailedPrecondition if it is so already.
        """
        try:
            release = parse(stored.key.decode(), stored.value)
        except MalformedConfig:
            return []
        if not instance.files or not isinstance(release, Release) or release.is_pinned:
            return []
        prefix = instance_key(instance.app, instance.version, "")
        others, revision = await self._client.get_below([prefix], [])
        for each in others:
            with suppress(MalformedConfig):
                other = parse(each.key.decode(), each.value)
                if isinstance(other, Instance) and other.id != instance.id and _differ(instance, other):
                    raise FailedPrecondition(
                        f"instance {other.id} has loaded other files of {instance.app}/{instance.version}, which "
                        "somebody has replaced: publish a new version, or stop the other instances"
                    )
        return [unwritten_since(prefix, revision)]

    async def _renewed(self, stored: etcd_pb2.KeyValue) -> Lease | None:
        try:
            return Lease(stored.lease, await self._client.keep_alive(stored.lease))
        except LeaseNotFound:
            return None

    async def _put(
        self,
        instance: Instance,
        release: etcd_pb2.KeyValue,
        stored: etcd_pb2.KeyValue | None,
        lease: Lease,
        beside: list[etcd_pb2.Compare],
    ) -> bool:
        unchanged = [
            written_at(instance.key, stored.mod_revision if stored else 0),
            # Fails the transaction if the release is deleted in the meantime.
            written_at(release.key.decode(), release.mod_revision),
            *beside,
        ]
        # Do not revoke the lease after a failure: the write may have taken effect. Otherwise the lease expires unused.
        try:
            return await self._client.commit(unchanged, [put(instance.key, instance.to_json(), lease.id)]) is not None
        except LeaseNotFound:
            return False

    async def deregister(self, app: str, version: str, id_: str) -> None:
        """Remove an instance and its lease, if it is registered. Raises Unavailable, EtcdError."""
        key = instance_key(app, version, id_)
        for _ in range(_ATTEMPTS):
            stored = await self._client.get(key)
            if stored is None:
                return
            if await self._client.commit([written_at(key, stored.mod_revision)], [delete(key)]):
                self.counts["deregistered"] += 1
                log.info("instance deregistered", instance=id_, app=app, version=version)
                if stored.lease:
                    await self._client.revoke(stored.lease)
                return
        raise Unavailable(f"instance {id_} of {app}/{version} keeps changing in etcd: try again")


def _differ(one: Instance, other: Instance) -> bool:
    """Return whether two instances have loaded different files of the same release."""
    return one.digest == other.digest and "" not in (one.files, other.files) and one.files != other.files


def _check_content(instance: Instance, stored: etcd_pb2.KeyValue) -> None:
    """Warn of an instance that has loaded other content than its release has now."""
    try:
        release = parse(stored.key.decode(), stored.value)
    except MalformedConfig:
        return
    if isinstance(release, Release) and not instance.serves(release):
        log.warning("instance outdated", instance=instance.id, app=instance.app, version=instance.version)


def _matches(stored: etcd_pb2.KeyValue, instance: Instance) -> bool:
    try:
        return parse(instance.key, stored.value) == instance
    except MalformedConfig:
        return False
