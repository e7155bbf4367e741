"""Conversions between the API's messages and the config's types."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec
import orjson

from atserving.config import Instance, MalformedConfig, Phase, Release, check_cost, is_name, validate
from atserving.errors import InvalidArgument
from atserving.v1 import registry_pb2
from registry.view import Delta

PART_CHARS = 4 << 20
"""A step is continued in another message after so many characters of JSON."""

_PHASES: dict[int, Phase] = {
    registry_pb2.PHASE_STAGING: "staging",
    registry_pb2.PHASE_PRODUCTION: "production",
}
_PHASE_NUMBERS: dict[Phase, registry_pb2.Phase.ValueType] = {
    "staging": registry_pb2.PHASE_STAGING,
    "production": registry_pb2.PHASE_PRODUCTION,
}


def release_from(message: registry_pb2.Release) -> tuple[Release, Collection[str]]:
    """Return the release to publish, and the names of the fields that the message sets. Raises InvalidArgument."""
    fields: dict[str, Any] = {"name": message.name, "version": message.version, "file": message.file}
    if message.phase != registry_pb2.PHASE_UNSPECIFIED:
        fields["phase"] = phase_from(message.phase, "release.phase")
    if message.desc:
        fields["desc"] = message.desc
    if message.HasField("image_width"):
        fields["image_width"] = message.image_width
    if message.HasField("batch_size"):
        fields["batch_size"] = message.batch_size
    if message.HasField("weight"):
        fields["weight"] = message.weight
    if message.use_device:
        fields["use_device"] = message.use_device
    fields["custom_files"] = dict(message.custom_files)
    fields["custom_values"] = _object(message.custom_values_json, "release.custom_values_json")
    fields["model_params"] = _object(message.model_params_json, "release.model_params_json")
    try:
        return validate(Release, fields), fields.keys()
    except MalformedConfig as error:
        raise InvalidArgument(f"release.{error}") from None


def release_to(release: Release) -> registry_pb2.Release:
    """Return the release as a message of the API."""
    return registry_pb2.Release(
        name=release.name,
        version=release.version,
        file=release.file,
        phase=_PHASE_NUMBERS[release.phase],
        desc=release.desc,
        lastmodified=release.lastmodified,
        image_width=release.image_width,
        batch_size=release.batch_size,
        custom_files=release.custom_files,
        custom_values_json=_json(release.custom_values),
        model_params_json=_json(release.model_params),
        use_device=release.use_device,
        weight=release.weight,
    )


def phase_from(phase: int, field: str) -> Phase:
    """Return the phase of a message. Raises InvalidArgument for an unknown phase."""
    if phase not in _PHASES:
        raise InvalidArgument(f"{field}: should be PHASE_STAGING or PHASE_PRODUCTION")
    return _PHASES[phase]


def instance_from(message: registry_pb2.Instance) -> Instance:
    """Return the instance of a message. Raises InvalidArgument."""
    names = ("app", "version", "id", "address", "capacity", "digest", "since")
    fields: dict[str, Any] = {name: getattr(message, name) for name in names}
    if message.HasField("plan"):
        plan = message.plan
        fields["plan"] = {name: getattr(plan, name) for name in ("device", "batch_size", "engines", "preparers")}
    try:
        return validate(Instance, fields)
    except MalformedConfig as error:
        raise InvalidArgument(f"instance.{error}") from None


def instance_to(instance: Instance) -> registry_pb2.Instance:
    """Return the instance as a message of the API."""
    fields = {name: value for name, value in msgspec.structs.asdict(instance).items() if name != "plan"}
    plan = registry_pb2.InstancePlan(**msgspec.structs.asdict(instance.plan)) if instance.plan else None
    return registry_pb2.Instance(**fields, plan=plan)


def release_status(release: Release, instances: Sequence[Instance]) -> registry_pb2.ReleaseStatus:
    """Return a release with its instances as a message of the API."""
    digest = release.digest
    return registry_pb2.ReleaseStatus(
        release=release_to(release),
        instances=[instance_to(each) for each in instances],
        outdated=[each.id for each in instances if each.digest not in ("", digest)],
        digest=digest,
    )


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


def _object(text: str, field: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        check_cost(text)
        value = orjson.loads(text)
        # A release holds this value one level deeper, and orjson reads deeper nesting than it writes.
        orjson.dumps([value])
    except MalformedConfig as error:
        raise InvalidArgument(f"{field}: {error}") from None
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"{field}: not JSON: {error}") from None
    except orjson.JSONEncodeError:
        raise InvalidArgument(f"{field}: nested too deeply") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field}: should be a JSON object")
    return value


def _json(value: dict[str, Any]) -> str:
    return orjson.dumps(value).decode() if value else ""
