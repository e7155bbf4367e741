"""Large resources, which pass through the gate without being parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from atserving import wire
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from atserving.wire import Buffer


class Body(NamedTuple):
    """The only resource of a request."""

    parts: Sequence[Buffer]
    """Its bytes, or its data URI in ASCII, in the parts in which they arrived."""
    is_uri: bool = False
    attribute_json: str = ""


def serialized(request: InferRequest, body: Body) -> tuple[list[Buffer], int]:
    """Return a request, serialized with this body as its resource, in parts; and its length.

    ``request`` has the other fields.
    """
    length = sum(map(len, body.parts))
    number = Resource.URI_FIELD_NUMBER if body.is_uri else Resource.BODY_FIELD_NUMBER
    inner = wire.field_head(number, length)
    # The fields of a message may come in any order.
    attribute = Resource(attribute_json=body.attribute_json).SerializeToString() if body.attribute_json else b""
    outer = wire.field_head(InferRequest.DATA_FIELD_NUMBER, len(inner) + length + len(attribute))
    head, tail = outer + inner, attribute + request.SerializeToString()
    return [head, *body.parts, tail], len(head) + length + len(tail)
