"""What can go wrong with etcd, told apart by what the caller can do about it."""

from __future__ import annotations

import grpc
import grpc.aio


class EtcdError(Exception):
    """A call to etcd failed; the message says why, and holds no secret."""


class EtcdUnavailable(EtcdError):  # noqa: N818 - named for what the caller sees
    """No answer, or none of worth: whether a write took effect is unknown, so read again before writing again."""


class EtcdRefused(EtcdError):  # noqa: N818
    """etcd understood the call and refused it; nothing was written."""


class Compacted(EtcdRefused):
    """The revision asked for is no longer kept."""


class FutureRevision(EtcdRefused):
    """The revision asked for does not exist yet: this is not the store the revision came from."""


class LeaseNotFound(EtcdRefused):
    """The lease has expired or was revoked."""


class TokenRefused(EtcdRefused):
    """The token has expired, or was issued before the rights changed: authenticate again and repeat the call."""


# etcd's own words (api/v3rpc/rpctypes/error.go); they come as status details and as reasons of a cancelled watch.
_BY_WORDS: tuple[tuple[str, type[EtcdRefused]], ...] = (
    ("required revision has been compacted", Compacted),
    ("required revision is a future revision", FutureRevision),
    ("requested lease not found", LeaseNotFound),
    ("invalid auth token", TokenRefused),
    ("user name is empty", TokenRefused),
    ("revision of auth store is old", TokenRefused),
    # The same from a write; it comes as UNKNOWN.
    ("revision in header is old", TokenRefused),
)

# The answers of a member that is well; any other status means that the member, or the way to it, is not.
_ANSWERS = frozenset(
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


def refusal(words: str) -> EtcdRefused:
    """The refusal that etcd put into ``words``."""
    kind = next((kind for phrase, kind in _BY_WORDS if phrase in words), EtcdRefused)
    return kind(words)


def translate(address: str, error: grpc.aio.AioRpcError) -> EtcdError:
    """The failure of one call to the member at ``address``."""
    details = error.details() or ""
    if error.code() in _ANSWERS or any(phrase in details for phrase, _ in _BY_WORDS):
        return refusal(details or error.code().name)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return EtcdUnavailable(f"{address}: does not answer")
    # grpcio wraps the cause of a failed connection: "failed to connect to all addresses; last error: ...".
    cause = details.rpartition("last error: ")[2] or error.code().name
    return EtcdUnavailable(f"{address}: {cause}")
