"""An asyncio client of etcd's v3 API over grpc.aio: only the calls that the registry needs.

The client rotates through the members of one cluster when one fails. It never retries a write.
"""

from registry.etcd.client import EtcdClient, Lease, Snapshot, delete, delete_below, put, unwritten_since, written_at
from registry.etcd.connection import Connection, User
from registry.etcd.counts import OK, CallCounts
from registry.etcd.errors import KINDS, Compacted, EtcdError, EtcdRefused, EtcdUnavailable, LeaseNotFound
from registry.etcd.tls import Tls

__all__ = [
    "KINDS",
    "OK",
    "CallCounts",
    "Compacted",
    "Connection",
    "EtcdClient",
    "EtcdError",
    "EtcdRefused",
    "EtcdUnavailable",
    "Lease",
    "LeaseNotFound",
    "Snapshot",
    "Tls",
    "User",
    "delete",
    "delete_below",
    "put",
    "unwritten_since",
    "written_at",
]
