"""The config in etcd: its keys, the types of its values, and the parser.

All keys are below ``/ava/serving/``, and all values are JSON. The parser ignores unknown fields, so that a newer writer
does not break an older reader; :func:`read` warns of them. Unknown fields of access rules may be misspelt rules: they
must not open an app, nor must unknown keys (:mod:`atserving.misplaced_rules`). A malformed value raises
:class:`MalformedConfig`, which names the field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
import orjson
from msgspec import Meta

from atserving import known_fields
from atserving.field_types import (
    Address,
    Device,
    FileUri,
    Group,
    Name,
    check_aliases,
    check_file,
    check_files,
    check_hosts,
    check_port,
    nanoseconds_of,
    parse_duration,
    parse_timeout,
)
from atserving.field_types import Phase as Phase
from atserving.field_types import is_name as is_name

PREFIX = "/ava/serving/"

DEFAULT_APP_METADATA_KEY = f"{PREFIX}app/default/metadata"
DEFAULT_WORKER_KEY = f"{PREFIX}worker/default"
ACCEPT_KEY = f"{PREFIX}deletions/accepted"
"""While this key exists, no deletion is held back (:mod:`atserving.holdback`)."""

HISTORY = f"{PREFIX}history/"
"""The prefix of the history of the config, which only registries read. It is no config."""

OPERATORS = f"{PREFIX}operators/"
"""The prefix of who may operate, which only registries read. It is no config of apps."""

DEFAULT_KEY_HEADER = "x-serving-key"

NOTE_KEY = f"{HISTORY}.note"
"""Written with each change that an operator makes by a call: who and why."""

MAX_WEIGHT = 1e6

MUTABLE = ("phase", "desc", "weight", "signature")
"""The fields of a published version that may change. The others are its content, which the signature covers."""

# So that a value costs each of its readers a few milliseconds. etcd refuses requests above 1.5 MiB.
_MAX_VALUE_BYTES = 1 << 20
_MAX_PARTS = 20_000
_MAX_UNKNOWN = 100
_MAX_REASON_CHARS = 1024

_INSTANCES = f"{PREFIX}instance/"
_MAX_INSTANCE_BYTES = 4096


class MalformedConfig(Exception):  # noqa: N818
    """A key or a value below ``/ava/serving/`` is malformed; the message says why, in at most 1024 characters."""

    def __init__(self, reason: str) -> None:
        # It may quote the value, and every reader keeps or logs it.
        super().__init__(reason[:_MAX_REASON_CHARS])


class _Value(msgspec.Struct, frozen=True, kw_only=True):
    readers: ClassVar[dict[str, Callable[[object], object]]] = {}
    """For fields that need more than a type: what makes their value of the stored one. It raises ValueError."""

    def to_json(self) -> str:
        """Return the value as JSON for etcd, without the fields that are not set."""
        return orjson.dumps(self._written()).decode()

    def _written(self) -> dict[str, Any]:
        fields = msgspec.to_builtins(self, builtin_types=(timedelta,))
        return {
            name: nanoseconds_of(value) if isinstance(value, timedelta) else value
            for name, value in fields.items()
            if value not in (None, {}, "")
        }


class Release(_Value, frozen=True, kw_only=True, dict=True, eq=False):
    """One version of one app: ``/ava/serving/eval/<app>/<version>``.

    Releases with different digests are never equal: true is not 1, and 1 not 1.0.
    """

    readers = {"file": check_file, "custom_files": check_files}

    name: Name
    version: Name
    file: FileUri
    phase: Phase = "staging"
    desc: str = ""
    lastmodified: str = ""
    image_width: Annotated[int, Meta(ge=1, le=16384)] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=4096)] | None = None
    custom_files: dict[str, FileUri] = {}
    custom_values: dict[str, Any] = {}
    model_params: dict[str, Any] = {}
    use_device: Device = "CPU"
    weight: Annotated[float, Meta(ge=0, le=MAX_WEIGHT)] | None = None
    signature: Annotated[str, Meta(max_length=200)] = ""
    """The signature of the content: see :mod:`atserving.signatures`."""

    @property
    def key(self) -> str:
        return release_key(self.name, self.version)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its content's JSON, in hex. Two releases with one digest give the same answers.

        Fields that are not set do not count, so that a reader that knows more fields finds the same digest.
        """
        return hashlib.sha256(_sorted_json(self._content())).hexdigest()

    def __eq__(self, other: object) -> bool:
        names = (*MUTABLE, "lastmodified", "digest")
        return isinstance(other, Release) and all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def is_pinned(self) -> bool:
        """Whether it names the digest of each of its files, so that other files are never loaded."""
        return all("#sha256=" in uri for uri in (self.file, *self.custom_files.values()))

    def differing(self, other: Release) -> list[str]:
        """Return the sorted names of the fields in which the contents differ: none if the digests are the same."""
        own, others = self._content(), other._content()
        names = sorted(own.keys() | others.keys())
        return [name for name in names if _sorted_json(own.get(name)) != _sorted_json(others.get(name))]

    def _content(self) -> dict[str, Any]:
        return {name: value for name, value in self._written().items() if name not in (*MUTABLE, "lastmodified")}


def _sorted_json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


class Owner(_Value, frozen=True, kw_only=True):
    """Who owns an app."""

    uid: int


_RULES = ("public", "owner", "user_whitelist", "group_whitelist")


class AppMetadata(_Value, frozen=True, kw_only=True):
    """The access rights of an app: ``/ava/serving/app/metadata/<app>``, or ``/ava/serving/app/default/metadata``."""

    public: bool | None = None
    owner: Owner | None = None
    user_whitelist: tuple[int, ...] | None = None
    group_whitelist: tuple[Group, ...] | None = None
    batch_size: Annotated[int, Meta(ge=1)] | None = None
    max_requests_per_second: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """The limits of each caller, at each gate."""
    max_in_flight: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    max_bytes_per_minute: Annotated[int, Meta(ge=1, le=1 << 50)] | None = None

    @property
    def says_who(self) -> bool:
        """Whether it has a rule of access."""
        return any(getattr(self, rule) is not None for rule in _RULES)


class Shadow(_Value, frozen=True, kw_only=True):
    """Copies ``percent`` of an app's unversioned requests to a version in staging."""

    version: Name
    percent: Annotated[float, Meta(ge=0, le=100)]
    score_tolerance: Annotated[float, Meta(ge=0, le=1)] = 0.01
    """By how much a ``score`` may differ in two answers that are the same."""
    box_tolerance: Annotated[float, Meta(ge=0, le=10_000)] = 2.0
    """By how many pixels each coordinate in ``pts`` may."""

    @property
    def settings(self) -> str:
        """A text that is another one with other settings."""
        return f"{self.percent!r} {self.score_tolerance!r} {self.box_tolerance!r}"


class AppRouting(_Value, frozen=True, kw_only=True):
    """How the requests for an app find a version: ``/ava/serving/app/routing/<app>``."""

    readers = {"aliases": check_aliases}

    aliases: dict[Name, Name] = {}
    """Versions by further names, for use in paths. A version of the same name comes first."""
    key_header: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")] = ""
    """The request header by whose value callers keep their version; empty: DEFAULT_KEY_HEADER."""
    shadow: Shadow | None = None


class WorkerConfig(_Value, frozen=True, kw_only=True):
    """The settings of a version's workers: ``/ava/serving/worker/...``. The most specific key wins, field by field."""

    readers = {
        "timeout": parse_timeout,
        "delay4batch": parse_duration,
        "wait_for_instance": parse_duration,
        "fetch_allow": check_hosts,
        "fetch_deny": check_hosts,
    }

    timeout: timedelta | None = None
    max_concurrent: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    delay4batch: timedelta | None = None
    wait_for_instance: timedelta | None = None
    """How long a gate holds a request for a version without a ready instance."""
    fetch_allow: tuple[str, ...] | None = None
    """The hosts that requests may name: see :mod:`atserving.hosts`."""
    fetch_deny: tuple[str, ...] | None = None
    """Those that they may not."""
    scripts: Literal["allow", "forbid"] | None = None
    """Whether a release with a ``net.py`` may run."""

    def over(self, general: WorkerConfig) -> WorkerConfig:
        """Return this config, with the fields that it does not set taken from a more general one.

        Hosts that either denies stay denied: who denies one to all apps means all.
        """
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        if self.fetch_deny and general.fetch_deny:
            own["fetch_deny"] = tuple(dict.fromkeys((*self.fetch_deny, *general.fetch_deny)))
        return msgspec.structs.replace(general, **own)


DEFAULT_WORKER = WorkerConfig(
    timeout=timedelta(seconds=30),
    max_concurrent=64,
    delay4batch=timedelta(0),
    wait_for_instance=timedelta(0),
    fetch_allow=("*",),
    fetch_deny=(),
    scripts="allow",
)


class InstancePlan(_Value, frozen=True, kw_only=True):
    """How an instance runs its net; see :mod:`evaluator.worker.plan`."""

    device: str
    batch_size: int
    engines: int
    preparers: int = 0


class Instance(_Value, frozen=True, kw_only=True):
    """One registered evaluator: ``/ava/serving/instance/<app>/<version>/<id>``, under a lease."""

    readers = {"address": check_port}

    app: Name
    version: Name
    id: Name
    address: Address
    capacity: Annotated[int, Meta(ge=1, le=1_000_000)]
    digest: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """The digest of the release that it has loaded. Empty: it comes from a time without digests."""
    files: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """The digest of the release's files as it has fetched them. Empty: unknown."""
    since: str = ""
    """When it began to serve, in RFC 3339."""
    plan: InstancePlan | None = None

    @property
    def key(self) -> str:
        return instance_key(self.app, self.version, self.id)

    def serves(self, release: Release) -> bool:
        """Return whether it has loaded the content of this release; assume so if it does not tell."""
        return self.digest in ("", release.digest)


_DECODE_INSTANCE = msgspec.json.Decoder(Instance).decode


class Acceptance(_Value, frozen=True, kw_only=True):
    """The value of ACCEPT_KEY, which says nothing more than that the key exists."""


ConfigValue = Release | AppMetadata | AppRouting | WorkerConfig | Instance | Acceptance
_T = TypeVar("_T", bound=_Value)


def release_key(app: str, version: str) -> str:
    return f"{PREFIX}eval/{app}/{version}"


CLOSED = AppMetadata(public=False, user_whitelist=())
"""Malformed access rules count as these, whatever the rules were before."""


def is_access_rules(key: str) -> bool:
    """Return whether a key holds the access rules of an app, or those of all apps."""
    start, _, app = key.rpartition("/")
    return key == DEFAULT_APP_METADATA_KEY or (f"{start}/" == app_metadata_key("") and is_name(app))


def may_be_rule(field: str) -> bool:
    """Return whether the name of a field is one of a rule of access, or like one."""
    return known_fields.meant(field, AppMetadata.__struct_fields__) in _RULES


def instance_key(app: str, version: str, id_: str) -> str:
    return f"{PREFIX}instance/{app}/{version}/{id_}"


def app_metadata_key(app: str) -> str:
    return f"{PREFIX}app/metadata/{app}"


def app_routing_key(app: str) -> str:
    return f"{PREFIX}app/routing/{app}"


def worker_keys(app: str, version: str) -> tuple[str, str, str]:
    """Return the keys of one version's worker config, the most specific first."""
    return (f"{PREFIX}worker/app/{app}/release/{version}", f"{PREFIX}worker/app/{app}/default", DEFAULT_WORKER_KEY)


def app_of(key: str) -> str | None:
    """Return the app that a key belongs to, or None for a default. Raises MalformedConfig for an unknown key."""
    match key.removeprefix(PREFIX).split("/", 6):
        case ["app", "default", "metadata"] | ["worker", "default"] | ["deletions", "accepted"]:
            return None
        case ["app", "metadata" | "routing", app] if key.startswith(PREFIX) and is_name(app):
            return app
        case (
            ["eval", app, _]
            | ["worker", "app", app, "default"]
            | ["worker", "app", app, "release", _]
            | ["instance", app, _, _]
        ) if key.startswith(PREFIX):
            return app
    raise MalformedConfig("unknown key")


def is_known(key: str) -> bool:
    """Return whether a key is one of the config."""
    try:
        app_of(key)
    except MalformedConfig:
        return False
    return True


def parse(key: str, value: str | bytes) -> ConfigValue:
    """Parse the value of a key. Raises MalformedConfig for an unknown key, invalid JSON, and a wrong field."""
    return _parse(key, value)[0]


def read(key: str, value: str | bytes) -> tuple[ConfigValue, str]:
    """Parse the value of a key; return a warning of its unknown fields, too, or an empty text.

    For the registry, which is the first to read what anybody wrote: it raises MalformedConfig as ``parse`` does, and
    for JSON that has a name twice, since one of its values would be lost.
    """
    found = _parse(key, value)
    if not isinstance(found[0], Instance):
        check_names(value)
    return found


def _parse(key: str, value: str | bytes) -> tuple[ConfigValue, str]:
    app_of(key)
    if key.startswith(_INSTANCES) and (instance := _instance(key, value)):
        return instance, ""
    fields = fields_of(value)
    kind: type[Release | AppMetadata | AppRouting | WorkerConfig | Instance]
    expected: dict[str, str] = {}
    match key.removeprefix(PREFIX).split("/"):
        case ["deletions", _]:
            return Acceptance(), ""
        case ["eval", app, version]:
            kind, expected = Release, {"name": app, "version": version}
        case ["instance", app, version, id_]:
            kind, expected = Instance, {"app": app, "version": version, "id": id_}
        case ["app", "routing", _]:
            kind = AppRouting
        case ["worker", *_]:
            kind = WorkerConfig
        case _:
            kind = AppMetadata
    unknown = [name for name in fields if name not in kind.__struct_fields__]
    if len(unknown) > _MAX_UNKNOWN:
        raise MalformedConfig(f"{len(unknown)} unknown fields exceed the limit of {_MAX_UNKNOWN}")
    parsed = _validate(kind, fields, expected)
    if isinstance(parsed, AppMetadata):
        _check_rules(parsed, fields, unknown)
    # No person writes an instance.
    warning = "" if isinstance(parsed, Instance) else known_fields.warning(unknown, kind.__struct_fields__)
    return parsed, warning


def _instance(key: str, value: str | bytes) -> Instance | None:
    """Read a well-formed instance in a fraction of the time; a large mesh has 100,000. None: read it as others are."""
    if len(value) > _MAX_INSTANCE_BYTES:
        return None
    try:
        instance = _DECODE_INSTANCE(value)
        check_port(instance.address)
    except (msgspec.DecodeError, ValueError):
        return None
    return instance if instance.key == key else None


def check_cost(value: str | bytes) -> None:
    """Raise MalformedConfig if a JSON text would cost much to parse."""
    if len(value) > _MAX_VALUE_BYTES:
        raise MalformedConfig(f"{len(value)} bytes of JSON exceed the limit of {_MAX_VALUE_BYTES}")
    parts = sum(map(value.count, ",[{")) if isinstance(value, str) else sum(map(value.count, b",[{"))
    if parts > _MAX_PARTS:
        raise MalformedConfig(f"{parts} commas and opening brackets exceed the limit of {_MAX_PARTS}")


def fields_of(value: str | bytes) -> dict[str, Any]:
    """Return the fields of a value. Raises MalformedConfig."""
    check_cost(value)
    try:
        fields = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise MalformedConfig(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise MalformedConfig("not a JSON object")
    try:
        # A value must also be writable: orjson reads deeper nesting than it writes.
        orjson.dumps(fields)
    except orjson.JSONEncodeError:
        raise MalformedConfig("nested too deeply") from None
    return fields


def check_names(value: str | bytes) -> None:
    """Raise MalformedConfig if an object in a JSON text has a name twice."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise MalformedConfig(f"the name {name[:80]!r} is there twice")
            names.add(name)

    json.loads(value, object_pairs_hook=check)


def _check_rules(rules: AppMetadata, fields: Mapping[str, Any], unknown: list[str]) -> None:
    """Raise MalformedConfig if the writer may have meant a rule that is not there."""
    misspelt = [name for name in unknown if may_be_rule(name)]
    if misspelt or (unknown and not rules.says_who):
        raise MalformedConfig(known_fields.warning(misspelt or unknown, AppMetadata.__struct_fields__))
    empty = [rule for rule in _RULES if rule in fields]
    if empty and not rules.says_who:
        raise MalformedConfig(f"{empty[0]}: null is no rule of access")


def _validate(kind: type[_T], fields: dict[str, Any], expected: dict[str, str]) -> _T:
    for field, want in expected.items():
        # The key names the app and version; the value may omit them but must not contradict the key.
        if fields.setdefault(field, want) != want:
            raise MalformedConfig(f"{field}: is {fields[field]!r}, but the key says {want!r}")
    return validate(kind, fields)


def validate(kind: type[_T], fields: Mapping[str, Any]) -> _T:
    """Return a value of ``kind`` from its fields. Raises MalformedConfig, which names the first wrong field."""
    read = dict(fields)
    for name, reader in kind.readers.items():
        if read.get(name) is not None:
            try:
                read[name] = reader(read[name])
            except ValueError as error:
                raise MalformedConfig(f"{name}{getattr(error, 'where', '')}: {error}") from None
    try:
        return msgspec.convert(read, kind, builtin_types=(timedelta,))
    except msgspec.ValidationError as error:
        raise MalformedConfig(_said(str(error))) from None


def _said(error: str) -> str:
    """Return msgspec's error with the field before the reason: "Expected ... - at `$.field`"."""
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", error):
        return f"{missing[1]}: the field is missing"
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", error, re.DOTALL)
    return f"{found[2]}: {found[1].replace('`', '')}" if found else error
