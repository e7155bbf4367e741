"""The tree of errors, each with its HTTP status. ``atserving.grpc_status`` translates them to gRPC.

A message tells the caller what is wrong and where. It never holds a stack trace, a path on the server or a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from atserving.v1 import evaluator_pb2


class StartError(Exception):
    """A process can't start. The message is the one line its operator sees."""

    exit_status: int = 1


class ServingError(Exception):
    """A request failed. Subclasses fix ``status``; ``code`` differs from it only where a net returned its own."""

    status: int = 500

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        retry_after_s: float | None = None,
        refused: bool = False,
        version: str = "",
        fields: Mapping[str, str] | None = None,
        limit: str = "",
        challenge: str = "",
        refusal: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.status if code is None else code
        self.retry_after_s = retry_after_s
        """When it is worth trying again, in seconds; None: not said."""
        self.refused = refused
        """Refused before any work was done: another instance may take the request."""
        self.version = version
        """The version of the instance that was asked last; empty if none was."""
        self.fields = fields or {}
        """The fields of the request that are wrong, and why."""
        self.limit = limit
        """The limit of the caller that is reached, as the header RateLimit-Policy has it; empty for other errors."""
        self.challenge = challenge
        """The schemes of credentials that would help, as the header WWW-Authenticate has them; empty: not said."""
        self.refusal = refusal
        """Why the gate or the instance refused it, where the class does not say it; for its metrics."""

    def to_proto(self) -> evaluator_pb2.Error:
        """The error as it travels from evaluator to gate."""
        return evaluator_pb2.Error(
            code=self.code,
            status=self.status,
            message=self.message,
            retry_after_ms=round((self.retry_after_s or 0) * 1000),
            refused=self.refused,
        )

    @staticmethod
    def from_proto(error: evaluator_pb2.Error) -> ServingError:
        """The error that ``to_proto`` wrote."""
        known = _BY_STATUS.get(error.status, ServingError)
        result = known(
            error.message,
            code=error.code,
            retry_after_s=error.retry_after_ms / 1000 or None,
            refused=error.refused,
        )
        result.status = error.status if 400 <= error.status <= 599 else 500
        return result


class InvalidArgument(ServingError):  # noqa: N818 - named as its status
    """400: the request, its resource or its image is at fault."""

    status = 400


class Unauthenticated(ServingError):  # noqa: N818
    """401: no credentials, or bad ones."""

    status = 401


class PermissionDenied(ServingError):  # noqa: N818
    """403: this caller may not use this app."""

    status = 403


class NotFound(ServingError):  # noqa: N818
    """404: no such app, version or path."""

    status = 404


class AlreadyExists(ServingError):  # noqa: N818
    """409: it exists with another content."""

    status = 409


class Aborted(ServingError):  # noqa: N818
    """409: it has changed since the caller has read it."""

    status = 409


class FailedPrecondition(ServingError):  # noqa: N818
    """400: the state of the mesh does not allow it now."""

    status = 400


class PayloadTooLarge(ServingError):  # noqa: N818
    """413: more than is taken at once."""

    status = 413


class UnsupportedMediaType(ServingError):  # noqa: N818
    """415: the body is neither JSON nor bytes."""

    status = 415


class ResourceExhausted(ServingError):  # noqa: N818
    """429: the queues are full; ``retry_after_s`` says when to come back."""

    status = 429


class Internal(ServingError):  # noqa: N818
    """500: the forward pass or the net failed."""

    status = 500


class ResourceUnreachable(ServingError):  # noqa: N818
    """502: the resource's host could not be reached."""

    status = 502


class Unavailable(ServingError):  # noqa: N818
    """503: nothing can serve this now."""

    status = 503


class DeadlineExceeded(ServingError):  # noqa: N818
    """504: the deadline passed; the work was cancelled."""

    status = 504


class NetError(ServingError):
    """The net returned a code of its own: 4xx the request or image, 5xx inference, below 300 one of Caffe's days."""

    _BELOW_300: ClassVar[dict[int, int]] = {-1: 400, -2: 500, -3: 400}

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message or f"the net failed with code {code}", code=code)
        # -1: over the batch size; -2: the forward pass failed; -3: bad image. Any other that is no HTTP error is a 500.
        self.status = code if 400 <= code <= 599 else self._BELOW_300.get(code, 500)


_BY_STATUS: dict[int, type[ServingError]] = {
    cls.status: cls
    for cls in (
        InvalidArgument,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        PayloadTooLarge,
        UnsupportedMediaType,
        ResourceExhausted,
        Internal,
        ResourceUnreachable,
        Unavailable,
        DeadlineExceeded,
    )
}
