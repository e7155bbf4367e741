"""The limits of a request's resources and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atserving import uris
from atserving.counting import MAX_GROUP, MAX_JSON_CHARS, MAX_REQUEST_BYTES
from atserving.errors import InvalidArgument
from atserving.uris import MAX_URI_CHARS
from atserving.v1 import evaluator_pb2
from atserving.wire import Buffer
from evaluator.options import Options

# A character of JSON or of a URI, in UTF-8.
_CHAR_BYTES = 4
# What a resource has on the wire beside its bytes, a URI or the start of one; and a call beside resources and JSON.
_URI_BYTES, _HEAD_BYTES = _CHAR_BYTES * MAX_URI_CHARS + 64, 1024


@dataclass(frozen=True)
class Limits:
    """The limits of one request. The contract (section 4) has the defaults for images; a release may set others.

    ``max_bytes`` bounds one resource, ``max_request_bytes`` all resources of a request together.
    """

    max_bytes: int = 10 << 20
    max_width: int = 4999
    max_height: int = 4999
    max_request_bytes: int = 64 << 20

    @staticmethod
    def of_release(custom_values: Options) -> Limits:
        """Read ``max_bytes``, ``max_width``, ``max_height`` and ``max_request_bytes``. Raises StartError."""
        return Limits(
            custom_values.positive_int("max_bytes", Limits.max_bytes),
            custom_values.positive_int("max_width", Limits.max_width),
            custom_values.positive_int("max_height", Limits.max_height),
            custom_values.positive_int("max_request_bytes", Limits.max_request_bytes),
        )

    def most_held_bytes(self, *, one: bool) -> int:
        """Return what the largest legal request counts in an instance; ``one``: it has one resource.

        An instance counts the request as it arrives, where data URIs are a third longer than what they hold. If it
        fetches another resource of the request, it counts what they hold, too.
        """
        resources = min(self.max_bytes, self.max_request_bytes)
        if not one:
            resources = min(MAX_GROUP * self.max_bytes, self.max_request_bytes)
        rest = (1 if one else MAX_GROUP) * _URI_BYTES + _CHAR_BYTES * MAX_JSON_CHARS
        inline = min(resources * 4 // 3 + rest, MAX_REQUEST_BYTES)
        return _HEAD_BYTES + (max(inline, resources + rest) if one else inline + resources)


class Budget:
    """How many bytes a request's resources may still take together."""

    def __init__(self, max_bytes: int, hold: Callable[[int], None] = lambda _: None) -> None:
        """``hold`` is called with all bytes that are taken; it may raise a ServingError."""
        self._max_bytes = self._left = max_bytes
        self._hold = hold

    def take(self, count: int) -> None:
        """Take ``count`` bytes. Raises InvalidArgument if they exceed the budget."""
        self._left -= count
        if self._left < 0:
            raise InvalidArgument(f"the request's resources are larger than {self._max_bytes} bytes together")
        self._hold(count)


def most_batched(limit: int) -> int:
    """Return up to how many requests in flight a task of a batch may be one: it leaves a quarter of ``limit`` free."""
    return limit - limit // 4


def too_large(label: str, max_bytes: int) -> InvalidArgument:
    """Return the error for a resource of more than ``max_bytes``."""
    return InvalidArgument(f"{label} is larger than {max_bytes} bytes")


def decode(uri: str | Buffer, max_bytes: int, budget: Budget) -> bytes:
    """Return the bytes of a data URI, and take them from ``budget``. Raises InvalidArgument."""
    data = uris.decode_data(uri)
    if len(data) > max_bytes:
        raise too_large("the resource", max_bytes)
    budget.take(len(data))
    return data


def check_request(request: evaluator_pb2.InferRequest, built_in: str | None) -> None:
    """Check the resources of a request; ``built_in`` names the built-in net, which takes one. Raises InvalidArgument.

    The worker checks each request, the front only those whose resources it fetches.
    """
    if not request.data:
        raise InvalidArgument("the request has no data")
    if len(request.data) > MAX_GROUP:
        raise InvalidArgument(f"the request has {len(request.data)} resources, more than {MAX_GROUP}")
    if built_in and (request.group or len(request.data) > 1):
        raise InvalidArgument(f"{built_in} takes one image, not a list of them")
    for each in request.data:
        if each.WhichOneof("source") is None:
            raise InvalidArgument("the request's data has neither a uri nor a body")
