"""Keys, transactions, leases and watches of etcd's API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from atserving.v1 import etcd_pb2
from registry.etcd.connection import Connection, Method
from registry.etcd.errors import Compacted, EtcdUnavailable, LeaseNotFound, refusal
from registry.etcd.renewals import KEEP_ALIVE, Renewals

PAGE_KEYS = 500
"""The number of keys in one page of a snapshot."""

_RANGE = Method("/etcdserverpb.KV/Range", etcd_pb2.RangeResponse)
_PUT = Method("/etcdserverpb.KV/Put", etcd_pb2.PutResponse)
_DELETE = Method("/etcdserverpb.KV/DeleteRange", etcd_pb2.DeleteRangeResponse)
_TXN = Method("/etcdserverpb.KV/Txn", etcd_pb2.TxnResponse)
_WATCH = Method("/etcdserverpb.Watch/Watch", etcd_pb2.WatchResponse, stream=True)
_GRANT = Method("/etcdserverpb.Lease/LeaseGrant", etcd_pb2.LeaseGrantResponse)
_REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", etcd_pb2.LeaseRevokeResponse)


@dataclass(frozen=True)
class Snapshot:
    """All keys below a prefix at one revision, sorted."""

    cluster_id: int
    revision: int
    kvs: Sequence[etcd_pb2.KeyValue]


@dataclass(frozen=True)
class Lease:
    """A lease and its time to live in seconds, as granted by etcd."""

    id: int
    ttl_s: int


def written_at(key: str, mod_revision: int) -> etcd_pb2.Compare:
    """Compare: the key was last written at ``mod_revision``; 0: the key does not exist."""
    return etcd_pb2.Compare(
        result=etcd_pb2.Compare.EQUAL,
        target=etcd_pb2.Compare.MOD,
        key=key.encode(),
        mod_revision=mod_revision,
    )


def unwritten_since(prefix: str, revision: int) -> etcd_pb2.Compare:
    """Compare: no key below ``prefix`` was written after ``revision``. It does not tell of deletions."""
    return etcd_pb2.Compare(
        result=etcd_pb2.Compare.LESS,
        target=etcd_pb2.Compare.MOD,
        key=prefix.encode(),
        range_end=_end(prefix),
        mod_revision=revision + 1,
    )


def put(key: str, value: str, lease: int = 0) -> etcd_pb2.RequestOp:
    """A write operation for a transaction."""
    return etcd_pb2.RequestOp(
        request_put=etcd_pb2.PutRequest(key=key.encode(), value=value.encode(), lease=lease),
    )


def delete(key: str) -> etcd_pb2.RequestOp:
    """A delete operation for a transaction."""
    return etcd_pb2.RequestOp(request_delete_range=etcd_pb2.DeleteRangeRequest(key=key.encode()))


def delete_below(prefix: str) -> etcd_pb2.RequestOp:
    """An operation for a transaction that deletes all keys below a prefix."""
    return etcd_pb2.RequestOp(
        request_delete_range=etcd_pb2.DeleteRangeRequest(key=prefix.encode(), range_end=_end(prefix))
    )


class EtcdClient:
    """etcd's API over one :class:`Connection`, which the client closes.

    Every method raises EtcdUnavailable if no member answers, and EtcdRefused if a member refuses. The client tries
    every other call at all members, but a write of keys only once.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.counts = connection.counts
        self._renewals = Renewals(connection)

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._renewals.close()
        await self._connection.close()

    async def get(self, key: str | bytes, revision: int = 0) -> etcd_pb2.KeyValue | None:
        """Return the key at ``revision`` (0: the latest), or None. Raises Compacted, EtcdRefused."""
        request = etcd_pb2.RangeRequest(key=_raw(key), revision=revision)
        response = await self._connection.read(_RANGE, request)
        return response.kvs[0] if response.kvs else None

    async def get_all(self, *keys: str) -> list[etcd_pb2.KeyValue | None]:
        """Return several keys at one revision; None for a key that does not exist."""
        ranges = [etcd_pb2.RequestOp(request_range=etcd_pb2.RangeRequest(key=key.encode())) for key in keys]
        response = await self._connection.read(_TXN, etcd_pb2.TxnRequest(success=ranges))
        found = [one.response_range.kvs for one in response.responses]
        return [kvs[0] if kvs else None for kvs in found]

    async def get_below(self, prefixes: Sequence[str], keys: Sequence[str]) -> tuple[list[etcd_pb2.KeyValue], int]:
        """Return all keys below some prefixes, and some keys, at one revision; and the revision."""
        ranges = [etcd_pb2.RangeRequest(key=each.encode(), range_end=_end(each)) for each in prefixes]
        ranges += [etcd_pb2.RangeRequest(key=each.encode()) for each in keys]
        request = etcd_pb2.TxnRequest(success=[etcd_pb2.RequestOp(request_range=each) for each in ranges])
        response = await self._connection.read(_TXN, request)
        kvs = [kv for one in response.responses for kv in one.response_range.kvs]
        return kvs, response.header.revision

    async def newest(self, prefix: str, limit: int, before: int = 0) -> list[etcd_pb2.KeyValue]:
        """Return at most ``limit`` keys below a prefix, the last created first: created before a revision (0: any)."""
        request = etcd_pb2.RangeRequest(
            key=prefix.encode(),
            range_end=_end(prefix),
            limit=limit,
            sort_order=etcd_pb2.RangeRequest.DESCEND,
            sort_target=etcd_pb2.RangeRequest.CREATE,
            max_create_revision=max(before - 1, 0),
        )
        return list((await self._connection.read(_RANGE, request)).kvs)

    async def oldest(self, prefix: str, limit: int) -> tuple[list[etcd_pb2.KeyValue], int]:
        """Return the first ``limit`` keys below a prefix, and the number of all of them."""
        request = etcd_pb2.RangeRequest(key=prefix.encode(), range_end=_end(prefix), limit=limit)
        response = await self._connection.read(_RANGE, request)
        return list(response.kvs), response.count

    async def snapshot(self, prefix: str, page_keys: int = PAGE_KEYS, *, without: str = "") -> Snapshot:
        """Read all keys below ``prefix``, in pages at the revision of the first page. Raises Compacted.

        Those below the prefix ``without`` are left out.
        """
        end = _end(prefix)
        ranges = [(_raw(prefix), _raw(without)), (_end(without), end)] if without else [(_raw(prefix), end)]
        kvs: list[etcd_pb2.KeyValue] = []
        cluster_id = revision = 0
        for start, stop in ranges:
            more = True
            while more:
                request = etcd_pb2.RangeRequest(key=start, range_end=stop, limit=page_keys, revision=revision)
                page = await self._connection.read(_RANGE, request)
                # The endpoints belong to different clusters, or the store was replaced between two pages.
                if cluster_id not in (0, page.header.cluster_id):
                    raise EtcdUnavailable("etcd's endpoints belong to different clusters")
                cluster_id = page.header.cluster_id
                revision = revision or page.header.revision
                kvs.extend(page.kvs)
                more = page.more
                if more:
                    start = page.kvs[-1].key + b"\0"
        return Snapshot(cluster_id, revision, kvs)

    async def txn(
        self, compare: Sequence[etcd_pb2.Compare], success: Sequence[etcd_pb2.RequestOp]
    ) -> etcd_pb2.TxnResponse:
        """Try a transaction once. After EtcdUnavailable, read again: it may have taken effect, or may do so yet."""
        return await self._connection.write(_TXN, etcd_pb2.TxnRequest(compare=compare, success=success))

    async def commit(self, compare: Sequence[etcd_pb2.Compare], success: Sequence[etcd_pb2.RequestOp]) -> int | None:
        """Try a transaction once and return its revision; None: read the keys and decide again.

        The result is None if a comparison failed, and if no answer came: the transaction may have taken effect then.
        """
        try:
            response = await self.txn(compare, success)
        except EtcdUnavailable:
            return None
        return response.header.revision if response.succeeded else None

    async def put(self, key: str | bytes, value: str | bytes, lease: int = 0) -> int:
        """Write a key unconditionally, trying once; return the revision."""
        request = etcd_pb2.PutRequest(key=_raw(key), value=_raw(value), lease=lease)
        return (await self._connection.write(_PUT, request)).header.revision

    async def delete(self, key: str) -> int:
        """Delete a key unconditionally, trying once; return the revision."""
        request = etcd_pb2.DeleteRangeRequest(key=key.encode())
        return (await self._connection.write(_DELETE, request)).header.revision

    async def grant(self, ttl_s: int) -> Lease:
        """Return a new lease. If the answer of a try is lost, the lease that it granted expires by itself."""
        response = await self._connection.read(_GRANT, etcd_pb2.LeaseGrantRequest(TTL=ttl_s))
        return Lease(response.ID, response.TTL)

    async def keep_alive(self, lease: int) -> int:
        """Renew a lease and return its time to live in seconds. Raises LeaseNotFound."""
        try:
            with self.counts.counted(KEEP_ALIVE.name):
                return await self._renewals.renew(lease)
        except EtcdUnavailable:
            # The stream is at one member. Try all.
            pass
        response = await self._connection.read(KEEP_ALIVE, etcd_pb2.LeaseKeepAliveRequest(ID=lease))
        if response.TTL <= 0:
            raise LeaseNotFound("the lease has expired")
        return response.TTL

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys. Does nothing if the lease has already ended."""
        try:
            await self._connection.read(_REVOKE, etcd_pb2.LeaseRevokeRequest(ID=lease))
        except LeaseNotFound:
            return

    async def watch(
        self,
        prefix: str,
        start_revision: int,
        *,
        before: bool = False,
        is_at: Callable[[int], None] = lambda _: None,
    ) -> AsyncGenerator[etcd_pb2.WatchResponse, None]:
        """Yield the changes below ``prefix`` from ``start_revision`` on, in order, without end. Raises Compacted.

        With ``before``, the events have the earlier values. The first response carries no events; its header holds the
        current revision of the store. Between two responses, ``is_at`` takes it every few seconds.
        """
        create = etcd_pb2.WatchCreateRequest(
            key=prefix.encode(), range_end=_end(prefix), start_revision=start_revision, prev_kv=before
        )
        # The user may read this key. A serializable read needs no quorum, so it tests this member alone.
        probe = etcd_pb2.RangeRequest(key=prefix.encode(), keys_only=True, serializable=True)
        request = etcd_pb2.WatchRequest(create_request=create)
        following = self._connection.follow(
            _WATCH, request, (_RANGE, probe), lambda response: is_at(response.header.revision)
        )
        # A watch counts once it has begun, and again when it breaks.
        with self.counts.counted(_WATCH.name):
            async with aclosing(following) as responses:
                async for response in responses:
                    if response.compact_revision:
                        raise Compacted(f"compacted at revision {response.compact_revision}")
                    if response.canceled:
                        # etcd 3.5 also answers "permission denied" if the token has expired.
                        self._connection.forget_token()
                        raise refusal(response.cancel_reason or "etcd cancelled the watch")
                    if response.created:
                        self.counts.count(_WATCH.name)
                    yield response


def _raw(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _end(prefix: str) -> bytes:
    # The first key after all keys with this prefix. The last byte of an ASCII prefix can be incremented.
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])
