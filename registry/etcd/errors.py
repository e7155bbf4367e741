"""The errors of etcd calls, one class for each reaction of the caller."""

from __future__ import annotations

from typing import ClassVar

import grpc
import grpc.aio


class EtcdError(Exception):
    """A call to etcd failed. The message says why and contains no secret."""

    kind: ClassVar[str] = "unavailable"
    """Names the class in metrics."""


class EtcdUnavailable(EtcdError):  # noqa: N818 - named like a gRPC status
    """No usable answer. A write may have taken effect: read again before you write again."""


class EtcdTimeout(EtcdUnavailable):
    """No answer in time."""

    kind = "timeout"


class EtcdRefused(EtcdError):  # noqa: N818
    """etcd refused the call and wrote nothing."""

    kind = "refused"


class Compacted(EtcdRefused):
    """etcd has compacted the requested revision away."""

    kind = "compacted"


class LeaseNotFound(EtcdRefused):
    """The lease has expired or was revoked."""

    kind = "lease_gone"


class OutOfSpace(EtcdRefused):
    """The database has no space left for writes; reads and deletions go on."""

    kind = "out_of_space"


class TokenRefused(EtcdRefused):
    """The token has expired, or permissions changed after it was issued: authenticate again and retry the call."""

    kind = "token_refused"


_ALL = (EtcdUnavailable, EtcdTimeout, EtcdRefused, Compacted, LeaseNotFound, OutOfSpace, TokenRefused)

KINDS = tuple(each.kind for each in _ALL)
"""The kinds of all errors."""


# etcd's messages (api/v3rpc/rpctypes/error.go), used as status details and as reasons of cancelled watches.
_BY_MESSAGE: tuple[tuple[str, type[EtcdRefused]], ...] = (
    ("required revision has been compacted", Compacted),
    ("requested lease not found", LeaseNotFound),
    ("database space exceeded", OutOfSpace),
    ("invalid auth token", TokenRefused),
    ("user name is empty", TokenRefused),
    ("revision of auth store is old", TokenRefused),
    # The same error from a write, with status UNKNOWN.
    ("revision in header is old", TokenRefused),
)

# The statuses of a healthy member's refusals. Any other status means that the member or the connection has failed.
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def refusal(message: str) -> EtcdRefused:
    """Return the error for a refusal with etcd's ``message``."""
    kind = next((kind for phrase, kind in _BY_MESSAGE if phrase in message), EtcdRefused)
    return kind(message)


def translate(address: str, error: grpc.aio.AioRpcError) -> EtcdError:
    """Return the error for a failed call to the member at ``address``."""
    details = error.details() or ""
    if error.code() in _REFUSALS or any(phrase in details for phrase, _ in _BY_MESSAGE):
        return refusal(details or error.code().name)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return EtcdTimeout(f"{address}: does not answer")
    # grpcio wraps the cause of a failed connection: "failed to connect to all addresses; last error: ...".
    cause = details.rpartition("last error: ")[2] or error.code().name
    return EtcdUnavailable(f"{address}: {cause}")
