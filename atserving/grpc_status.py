"""Translates errors to gRPC statuses. Only servers import this; the errors themselves know no gRPC."""

from __future__ import annotations

import grpc

from atserving.errors import Aborted, FailedPrecondition, ServingError

_STATUS_BY_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

_STATUS_BY_CLASS = {
    Aborted: grpc.StatusCode.ABORTED,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
}


def grpc_status(error: ServingError) -> grpc.StatusCode:
    """Return the gRPC status of an error, mostly by its HTTP status.

    Any other 4xx is INVALID_ARGUMENT. 570 to 579 are UNAVAILABLE: the caller may retry them. Any other 5xx is INTERNAL.
    """
    if status := _STATUS_BY_CLASS.get(type(error)):
        return status
    if error.status in _STATUS_BY_HTTP:
        return _STATUS_BY_HTTP[error.status]
    if error.status < 500:
        return grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.UNAVAILABLE if 570 <= error.status <= 579 else grpc.StatusCode.INTERNAL
