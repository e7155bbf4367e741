"""Every error has one gRPC status."""

from __future__ import annotations

import grpc
import pytest

from atserving import errors
from atserving.errors import NetError, ServingError
from atserving.grpc_status import grpc_status

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidArgument("x"), Code.INVALID_ARGUMENT),
        (errors.Unauthenticated("x"), Code.UNAUTHENTICATED),
        (errors.PermissionDenied("x"), Code.PERMISSION_DENIED),
        (errors.NotFound("x"), Code.NOT_FOUND),
        (errors.AlreadyExists("x"), Code.ALREADY_EXISTS),
        (errors.PayloadTooLarge("x"), Code.INVALID_ARGUMENT),
        (errors.UnsupportedMediaType("x"), Code.INVALID_ARGUMENT),
        (errors.ResourceExhausted("x"), Code.RESOURCE_EXHAUSTED),
        (errors.Internal("x"), Code.INTERNAL),
        (errors.ResourceUnreachable("x"), Code.UNAVAILABLE),
        (errors.Unavailable("x"), Code.UNAVAILABLE),
        (errors.DeadlineExceeded("x"), Code.DEADLINE_EXCEEDED),
        (NetError(422, "x"), Code.INVALID_ARGUMENT),
        (NetError(-2, "x"), Code.INTERNAL),
        (NetError(571, "x"), Code.UNAVAILABLE),
        (NetError(599, "x"), Code.INTERNAL),
    ],
    ids=repr,
)
def test_an_error_has_a_grpc_status(error: ServingError, status: grpc.StatusCode) -> None:
    assert grpc_status(error) is status
