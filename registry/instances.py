"""Live instances: keys under leases, which vanish with the process they stand for.

No registry remembers an instance. The key in etcd knows its lease, so that every call may come to another registry.
"""

from __future__ import annotations

import structlog

from atserving.config import Instance, MalformedConfig, parse, release_key
from atserving.errors import NotFound, Unavailable
from atserving.v1 import etcd_pb2
from registry.etcd import EtcdClient, Lease, LeaseNotFound, delete, put, written_at

log = structlog.get_logger()

_ATTEMPTS = 4


class Instances:
    """Registers instances under leases of ``ttl_s`` seconds."""

    def __init__(self, client: EtcdClient, ttl_s: int) -> None:
        self._client = client
        self._ttl_s = ttl_s

    async def register(self, instance: Instance) -> int:
        """Registers an instance or keeps it registered; returns its lease's time to live in seconds.

        Raises NotFound where the release is not published, EtcdError.
        """
        for _ in range(_ATTEMPTS):
            release, held = await self._client.get_all(release_key(instance.app, instance.version), instance.key)
            if release is None:
                raise NotFound(f"release {instance.app}/{instance.version} is not published")
            lease = await self._renewed(held) if held and held.lease else None
            if lease and held and _is(held, instance):
                return lease.ttl_s
            lease = lease or await self._client.grant(self._ttl_s)
            if await self._put(instance, release, held, lease):
                log.info("instance registered", **instance.model_dump())
                return lease.ttl_s
        raise Unavailable(
            f"instance {instance.id} of {instance.app}/{instance.version} keeps changing in etcd: try again"
        )

    async def _renewed(self, held: etcd_pb2.KeyValue) -> Lease | None:
        try:
            return Lease(held.lease, await self._client.keep_alive(held.lease))
        except LeaseNotFound:
            return None

    async def _put(
        self, instance: Instance, release: etcd_pb2.KeyValue, held: etcd_pb2.KeyValue | None, lease: Lease
    ) -> bool:
        unchanged = [
            written_at(instance.key, held.mod_revision if held else 0),
            # A release deleted in this moment leaves no registration behind.
            written_at(release.key.decode(), release.mod_revision),
        ]
        # Where nothing was written, or who knows, the lease is left to expire: it may hold the key.
        try:
            return await self._client.commit(unchanged, [put(instance.key, instance.to_json(), lease.id)]) is not None
        except LeaseNotFound:
            return False

    async def deregister(self, app: str, version: str, id_: str) -> None:
        """Removes an instance at once, if it is there. Raises EtcdError."""
        key = Instance.model_construct(app=app, version=version, id=id_).key
        for _ in range(_ATTEMPTS):
            held = await self._client.get(key)
            if held is None:
                return
            if await self._client.commit([written_at(key, held.mod_revision)], [delete(key)]):
                log.info("instance deregistered", app=app, version=version, id=id_)
                if held.lease:
                    await self._client.revoke(held.lease)
                return
        raise Unavailable(f"instance {id_} of {app}/{version} keeps changing in etcd: try again")


def _is(held: etcd_pb2.KeyValue, instance: Instance) -> bool:
    try:
        return parse(instance.key, held.value) == instance
    except MalformedConfig:
        return False
