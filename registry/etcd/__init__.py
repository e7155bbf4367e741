"""An asyncio client of etcd's v3 API over grpc.aio: what the registry needs of it, and nothing of the registry.

It knows several members of one cluster and moves to the next when one fails; it never repeats a write by itself.
"""

from registry.etcd.client import EtcdClient, Lease, Snapshot, delete, put, written_at
from registry.etcd.connection import Connection, Tls, User
from registry.etcd.errors import Compacted, EtcdError, EtcdRefused, EtcdUnavailable, FutureRevision, LeaseNotFound

__all__ = [
    "Compacted",
    "Connection",
    "EtcdClient",
    "EtcdError",
    "EtcdRefused",
    "EtcdUnavailable",
    "FutureRevision",
    "Lease",
    "LeaseNotFound",
    "Snapshot",
    "Tls",
    "User",
    "delete",
    "put",
    "written_at",
]
