"""Conversions between the API's messages and the config's types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from atserving.config import Instance, MalformedConfig, is_name, validate
from atserving.errors import InvalidArgument
from atserving.v1 import registry_pb2
from registry.view import Delta

PART_CHARS = 4 << 20
"""A step is continued in another message after so many characters of JSON."""


def instance_from(message: registry_pb2.Instance) -> Instance:
    """Return the instance of a message. Raises InvalidArgument."""
    names = ("app", "version", "id", "address", "capacity", "digest", "since", "files")
    fields: dict[str, Any] = {name: getattr(message, name) for name in names}
    if message.HasField("plan"):
        plan = message.plan
        fields["plan"] = {name: getattr(plan, name) for name in ("device", "batch_size", "engines", "preparers")}
    try:
        return validate(Instance, fields)
    except MalformedConfig as error:
        raise InvalidArgument(f"instance.{error}") from None


def name_from(text: str, field: str) -> str:
    """Return the checked name of an app, a version or an instance. Raises InvalidArgument."""
    if not is_name(text):
        raise InvalidArgument(f"{field}: {text[:80]!r} should match [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}")
    return text


def watch_responses(delta: Delta) -> Iterator[registry_pb2.WatchResponse]:
    """Yield one step of a view as messages of the stream, each well below the size limit of a message."""
    part = registry_pb2.WatchResponse(reset=delta.reset, deletes=sorted(delta.deletes))
    size = 0
    for key, value in delta.upserts.items():
        if size > PART_CHARS:
            part.revision, part.stale, part.more = delta.revision, delta.stale, True
            yield part
            part, size = registry_pb2.WatchResponse(), 0
        part.upserts.add(key=key, value_json=value)
        size += len(key) + len(value)
    part.revision, part.stale = delta.revision, delta.stale
    yield part
