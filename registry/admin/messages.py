"""Conversions between the messages of the API and the config's types."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import orjson
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from atserving.admin.v1 import admin_pb2
from atserving.config import (
    DEFAULT_WORKER,
    AppMetadata,
    Instance,
    Phase,
    Release,
    WorkerConfig,
    is_name,
)
from atserving.errors import FailedPrecondition, InvalidArgument
from registry.admin.history import Change
from registry.admin.state import AppState, access_key, older_instances, worker_key
from registry.comparisons import Comparison, quantile_s

_PHASES: dict[int, Phase] = {admin_pb2.PHASE_STAGING: "staging", admin_pb2.PHASE_PRODUCTION: "production"}
_PHASE_NUMBERS: dict[Phase, admin_pb2.Phase.ValueType] = {
    "staging": admin_pb2.PHASE_STAGING,
    "production": admin_pb2.PHASE_PRODUCTION,
}
_MOST_EXACT = 1 << 53
# Each level of JSON takes three of a message, and those have a hundred.
_MOST_DEEP = 25


def name_from(text: str, field: str) -> str:
    """Return the checked name of an app, a version or an alias. Raises InvalidArgument."""
    if not is_name(text):
        reason = f"{text[:80]!r} should match [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}"
        raise InvalidArgument(f"{field}: {reason}", fields={field: reason})
    return text


def app_from(name: str) -> str:
    """Return the checked name of an app, which may be empty. Raises InvalidArgument."""
    return name_from(name, "app") if name else ""


def version_from(name: str) -> str:
    """Return the checked name of a version, which may be empty. Raises InvalidArgument."""
    return name_from(name, "version") if name else ""


def revision_from(text: str) -> int:
    """Return the revision that a text names. Raises InvalidArgument."""
    if not text.isdecimal() or len(text) > 18:
        reason = f"{text[:80]!r} is no revision"
        raise InvalidArgument(f"revision: {reason}", fields={"revision": reason})
    return int(text)


def phase_from(phase: int, field: str) -> Phase:
    """Return the phase of a message. Raises InvalidArgument for an unknown one."""
    if phase not in _PHASES:
        reason = "should be PHASE_STAGING or PHASE_PRODUCTION"
        raise InvalidArgument(f"{field}: {reason}", fields={field: reason})
    return _PHASES[phase]


def release_fields(message: admin_pb2.Release) -> dict[str, Any]:
    """Return the fields of a release for etcd, those that the message sets. Raises InvalidArgument."""
    fields: dict[str, Any] = {"name": message.app, "version": message.version, "file": message.file}
    if message.phase != admin_pb2.PHASE_UNSPECIFIED:
        fields["phase"] = phase_from(message.phase, "phase")
    for name in ("desc", "use_device", "signature"):
        if value := getattr(message, name):
            fields[name] = value
    given = {field.name for field, _ in message.ListFields()}
    for name in {"image_width", "batch_size", "weight"} & given:
        fields[name] = getattr(message, name)
    if message.custom_files:
        fields["custom_files"] = dict(message.custom_files)
    for name in {"custom_values", "model_params"} & given:
        if values := _values(getattr(message, name), name):
            fields[name] = values
    return fields


def _values(struct: Struct, field: str) -> dict[str, Any]:
    """Return the values of a Struct; whole numbers become integers, as JSON's 1 and 1.0 are one number to it."""

    def exact(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            if abs(value) > _MOST_EXACT:
                reason = f"{value:.0f} has more than 53 bits"
                raise InvalidArgument(f"{field}: {reason}", fields={field: reason})
            return int(value)
        if isinstance(value, list):
            return [exact(each) for each in value]
        if isinstance(value, dict):
            return {name: exact(each) for name, each in value.items()}
        return value

    try:
        found: dict[str, Any] = exact(MessageToDict(struct))
    except ValueError:
        raise InvalidArgument(f"{field}: has NaN or an infinity", fields={field: "has NaN or an infinity"}) from None
    return found


def release_to(state: AppState, release: Release) -> admin_pb2.Release:
    """Return a release as a message."""
    version = release.version
    message = admin_pb2.Release(
        app=release.name,
        version=version,
        etag=state.etag_of(release.key),
        file=release.file,
        phase=_PHASE_NUMBERS[release.phase],
        desc=release.desc,
        lastmodified=_timestamp(release.lastmodified),
        image_width=release.image_width,
        batch_size=release.batch_size,
        custom_files=release.custom_files,
        use_device=release.use_device,
        weight=release.weight,
        signature=release.signature,
        digest=release.digest,
        instances=len(state.ready(version)),
        outdated=state.outdated(version),
        aliases=state.aliases_of(version),
        warnings=_warnings(state, release.key),
    )
    if message.outdated:
        message.warnings.append(older_instances(message.outdated))
    for name in ("custom_values", "model_params"):
        if values := getattr(release, name):
            if _is_deep(values, _MOST_DEEP):
                message.warnings.append(f"{name}: nested too deeply for this API, see etcd")
            else:
                getattr(message, name).update(values)
    return message


def _is_deep(value: Any, most: int) -> bool:
    """Return whether a value is nested deeper than ``most``; messages have a limit."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(most <= 0 or _is_deep(each, most - 1) for each in parts)


def app_to(state: AppState) -> admin_pb2.App:
    """Return an app as a message."""
    routing = state.routing
    return admin_pb2.App(
        name=state.app,
        etag=state.etag,
        aliases=routing.aliases,
        key_header=routing.key_header,
        shadow=admin_pb2.Shadow(**msgspec.structs.asdict(routing.shadow)) if routing.shadow else None,
        shares=[
            admin_pb2.Share(version=each.version, weight=each.weight, capacity=each.capacity, share=each.share)
            for each in state.shares()
        ],
        releases=len(state.releases),
        instances=sum(len(state.ready(version)) for version in state.releases),
        warnings=[f"{key}: {reason}" for key, reason in sorted((state.malformed | state.warnings).items())],
    )


def access_to(state: AppState) -> admin_pb2.Access:
    """Return the access rules of an app, or the default ones, as a message."""
    key = access_key(state.app)
    rules = state.access() or AppMetadata()
    return admin_pb2.Access(
        app=state.app,
        etag=state.etag_of(key),
        public=rules.public,
        owner=admin_pb2.Access.Owner(uid=rules.owner.uid) if rules.owner else None,
        user_whitelist=admin_pb2.Access.Users(uids=rules.user_whitelist) if rules.user_whitelist is not None else None,
        group_whitelist=admin_pb2.Access.Groups(names=rules.group_whitelist)
        if rules.group_whitelist is not None
        else None,
        max_requests_per_second=rules.max_requests_per_second,
        max_in_flight=rules.max_in_flight,
        max_bytes_per_minute=rules.max_bytes_per_minute,
        malformed=state.malformed.get(key, ""),
        warnings=[state.warnings[key]] if key in state.warnings else [],
    )


def worker_to(state: AppState, version: str) -> admin_pb2.Worker:
    """Return the worker settings of one level as a message."""
    key = worker_key(state.app, version)
    config = state.worker(version) or WorkerConfig()
    return admin_pb2.Worker(
        app=state.app,
        version=version,
        etag=state.etag_of(key),
        timeout=_duration(config.timeout),
        max_concurrent=config.max_concurrent,
        delay4batch=_duration(config.delay4batch),
        wait_for_instance=_duration(config.wait_for_instance),
        fetch_allow=_hosts(config.fetch_allow),
        fetch_deny=_hosts(config.fetch_deny),
        scripts=config.scripts,
        warnings=_warnings(state, key),
    )


def merged_worker(defaults: AppState, state: AppState, version: str) -> admin_pb2.MergedWorker:
    """Return the settings that apply to a version, and where each comes from."""
    kinds = admin_pb2.MergedWorker
    levels = [
        (kinds.LEVEL_VERSION, worker_key(state.app, version), state.worker(version)),
        (kinds.LEVEL_APP, worker_key(state.app, ""), state.worker("")),
        (kinds.LEVEL_ALL_APPS, worker_key("", ""), defaults.worker("")),
        (kinds.LEVEL_BUILT_IN, "", DEFAULT_WORKER),
    ]
    merged = kinds(app=state.app, version=version)
    applied = WorkerConfig()
    for _, _, config in levels:
        applied = applied.over(config or WorkerConfig())
    for name in WorkerConfig.__struct_fields__:
        # Hosts that several levels deny come from the most specific of them.
        level, key = next((level, key) for level, key, config in levels if config and getattr(config, name) is not None)
        value = getattr(applied, name)
        text = f"{value.total_seconds():g}s" if isinstance(value, timedelta) else value
        merged.settings.add(name=name, value_json=orjson.dumps(text).decode(), level=level, key=key)
    return merged


def instance_to(state: AppState, instance: Instance) -> admin_pb2.InstanceStatus:
    """Return an instance as a message."""
    release = state.releases.get(instance.version)
    plan = admin_pb2.InstanceStatus.Plan(**msgspec.structs.asdict(instance.plan)) if instance.plan else None
    return admin_pb2.InstanceStatus(
        app=instance.app,
        version=instance.version,
        id=instance.id,
        address=instance.address,
        capacity=instance.capacity,
        digest=instance.digest,
        outdated=release is None or not instance.serves(release),
        since=_timestamp(instance.since),
        plan=plan,
    )


def comparison_to(found: Comparison) -> admin_pb2.Comparison:
    """Return what was found of a version as a message."""
    kinds = admin_pb2.Comparison
    message = kinds(verdict=found.verdict)
    for name in ("app", "version", "baseline", "equal", "different", "failed", "dropped", "slower", "gates"):
        setattr(message, name, getattr(found, name))
    message.since.FromMilliseconds(found.since_ms)
    for prefix, times in (("", found.times), ("baseline_", found.baseline_times)):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            getattr(message, prefix + name).FromMicroseconds(round(quantile_s(times, share) * 1e6))
    for each in found.samples:
        sample = message.samples.add(reqid=each.reqid, failed=each.failed, reason=each.reason)
        sample.time.FromMilliseconds(each.time_ms)
    return message


def change_to(change: Change) -> admin_pb2.Change:
    """Return an entry of the history as a message."""
    kinds = admin_pb2.Change
    kind = kinds.ACTOR_KIND_ETCD
    if change.method:
        kind = kinds.ACTOR_KIND_CLIENT if change.actor else kinds.ACTOR_KIND_UNSPECIFIED
    if change.proven:
        kind = kinds.ACTOR_KIND_OPERATOR
    message = kinds(
        revision=str(change.revision),
        app=change.app,
        actor=change.actor,
        actor_kind=kind,
        method=change.method,
        message=change.message,
        keys=[
            admin_pb2.KeyChange(key=each.key, before=each.before, after=each.after, omitted=each.omitted)
            for each in change.keys
        ],
    )
    message.time.FromMilliseconds(round(change.time * 1000))
    return message


def access_fields(message: admin_pb2.Access) -> dict[str, Any]:
    """Return the fields of access rules for etcd, those that the message sets."""
    fields: dict[str, Any] = {}
    if message.HasField("public"):
        fields["public"] = message.public
    if message.HasField("owner"):
        fields["owner"] = {"uid": message.owner.uid}
    if message.HasField("user_whitelist"):
        fields["user_whitelist"] = list(message.user_whitelist.uids)
    if message.HasField("group_whitelist"):
        fields["group_whitelist"] = list(message.group_whitelist.names)
    for name in ("max_requests_per_second", "max_in_flight", "max_bytes_per_minute"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    return fields


def worker_fields(message: admin_pb2.Worker) -> dict[str, Any]:
    """Return the fields of worker settings for etcd, those that the message sets."""
    fields: dict[str, Any] = {}
    given = {field.name for field, _ in message.ListFields()}
    for name in {"timeout", "delay4batch", "wait_for_instance"} & given:
        fields[name] = _go_duration(getattr(message, name), name)
    if message.HasField("max_concurrent"):
        fields["max_concurrent"] = message.max_concurrent
    for name in {"fetch_allow", "fetch_deny"} & given:
        fields[name] = list(getattr(message, name).hosts)
    if message.HasField("scripts"):
        fields["scripts"] = message.scripts
    return fields


def masked(
    fields: Mapping[str, Any],
    paths: Collection[str],
    known: Iterable[str],
    current: Mapping[str, Any],
    malformed: str | None = None,
) -> dict[str, Any]:
    """Return the current fields with those of a mask replaced, or removed where ``fields`` lacks them.

    Without a mask, all of ``fields`` are. Raises InvalidArgument for a path that is not ``known``, and
    FailedPrecondition for a mask if the current value is ``malformed``.
    """
    if malformed and paths:
        raise FailedPrecondition(
            f"the value in etcd is malformed ({malformed}): replace it without a mask, or delete it"
        )
    changed = wanted(fields, paths, known)
    kept = {name: value for name, value in current.items() if name not in changed}
    return kept | {name: fields[name] for name in changed if name in fields}


def wanted(fields: Mapping[str, Any], paths: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the fields to change: those of a mask, or all that are given. Raises InvalidArgument."""
    paths, known = list(paths), list(known)
    for path in paths:
        if path not in known:
            raise _wrong_mask(f"{path[:80]!r} should be one of {', '.join(known)}")
    if not paths and not fields:
        # A misspelt field of REST does not arrive here.
        raise _wrong_mask(f"there is nothing to change: name at least one of {', '.join(known)}")
    return paths or list(fields)


def _wrong_mask(reason: str) -> InvalidArgument:
    return InvalidArgument(f"update_mask: {reason}", fields={"update_mask": reason})


def _warnings(state: AppState, key: str) -> list[str]:
    found = [warning] if (warning := state.warnings.get(key)) else []
    if reason := state.malformed.get(key):
        found.append(f"the value in etcd is malformed, and the last good one goes on: {reason}")
    return found


def _timestamp(text: str) -> Timestamp | None:
    try:
        moment = datetime.fromisoformat(text)
        found = Timestamp()
        found.FromDatetime(moment.astimezone(UTC))
    except (ValueError, OverflowError):
        return None
    return found


def _hosts(patterns: tuple[str, ...] | None) -> admin_pb2.Worker.Hosts | None:
    return None if patterns is None else admin_pb2.Worker.Hosts(hosts=patterns)


def _duration(value: timedelta | None) -> Duration | None:
    if value is None:
        return None
    found = Duration()
    found.FromTimedelta(value)
    return found


def _go_duration(value: Duration, field: str) -> str | int:
    """Return a duration as etcd's values have it: in Go's notation where it is exact, else in nanoseconds."""
    nanoseconds = value.seconds * 10**9 + value.nanos
    if nanoseconds < 0:
        raise InvalidArgument(f"{field}: should not be negative", fields={field: "should not be negative"})
    if nanoseconds % 10**9 == 0:
        return f"{nanoseconds // 10**9}s"
    return f"{nanoseconds // 10**6}ms" if nanoseconds % 10**6 == 0 else nanoseconds
