"""The config of one app with its instances, as the mirror or etcd has it at one revision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from atserving.config import (
    PREFIX,
    AppMetadata,
    AppRouting,
    Instance,
    MalformedConfig,
    Release,
    WorkerConfig,
    app_metadata_key,
    app_routing_key,
    read,
    release_key,
    worker_keys,
)
from atserving.v1 import etcd_pb2
from registry.admin.effects import ineffective
from registry.view import Entry

ABSENT = "0"
"""The etag of what does not exist: a write with it is refused once it does."""

_NO_ROUTING = AppRouting()


@dataclass(frozen=True)
class Share:
    """What a version in production gets of an app's unversioned requests."""

    version: str
    weight: float | None
    capacity: int
    share: float


class AppState:
    """The config of one app: its entries in etcd, by key. An empty app stands for the defaults."""

    def __init__(self, app: str, entries: Mapping[str, Entry], malformed: Mapping[str, str] | None = None) -> None:
        self.app = app
        self.entries = dict(entries)
        self.malformed = dict(malformed or {})
        """Keys whose value is malformed, and the reason. They may have an entry, too: the last good value."""
        self.revisions = {key: each.revision for key, each in self.entries.items()}
        """The revision of the last write of each key."""
        self.warnings: dict[str, str] = {}
        """Keys with unknown fields, and what they may mean; and keys without effect."""
        self.releases: dict[str, Release] = {}
        """By version, sorted."""
        self.routing = _NO_ROUTING
        self.instances: dict[str, list[Instance]] = {}
        """By version; sorted by id."""
        for _, entry in sorted(self.entries.items()):
            match entry.value:
                case Release() as release:
                    self.releases[release.version] = release
                case AppRouting() as routing:
                    self.routing = routing
                case Instance() as instance:
                    self.instances.setdefault(instance.version, []).append(instance)

    @staticmethod
    def read(app: str, kvs: Iterable[etcd_pb2.KeyValue]) -> AppState:
        """Return the state that etcd has. A malformed key has no entry."""
        entries: dict[str, Entry] = {}
        malformed: dict[str, str] = {}
        revisions: dict[str, int] = {}
        for kv in kvs:
            key = kv.key.decode(errors="backslashreplace")
            revisions[key] = kv.mod_revision
            try:
                value, _ = read(key, kv.value)
            except MalformedConfig as error:
                malformed[key] = str(error)
            else:
                entries[key] = Entry(kv.value.decode(), value, kv.create_revision, kv.mod_revision)
        state = AppState(app, entries, malformed)
        state.revisions = revisions
        return state

    def ineffective(self) -> dict[str, str]:
        """Return why keys have no effect, or not all of it."""
        return ineffective(self.app, {key: each.value for key, each in self.entries.items()}, self.malformed)

    def warn(self, warnings: Mapping[str, str]) -> None:
        """Add warnings of keys."""
        for key, reason in warnings.items():
            self.warnings[key] = f"{self.warnings[key]}; {reason}" if key in self.warnings else reason

    @property
    def exists(self) -> bool:
        """Whether it has any config."""
        return any(not isinstance(each.value, Instance) for each in self.entries.values()) or bool(self.malformed)

    @property
    def versions(self) -> set[str]:
        """The versions that have a key, malformed ones too."""
        prefix = release_key(self.app, "")
        return {key.removeprefix(prefix) for key in self.revisions if key.startswith(prefix)}

    @property
    def etag(self) -> str:
        """It changes with every write and deletion of the config; ABSENT if there is none."""
        written = sorted((key, revision) for key, revision in self.revisions.items() if "/instance/" not in key)
        return hashlib.sha256(repr(written).encode()).hexdigest()[:16] if written else ABSENT

    def etag_of(self, key: str) -> str:
        """Return the revision of the last write of a key; ABSENT if it does not exist."""
        return str(self.revisions.get(key, ABSENT))

    def access(self) -> AppMetadata | None:
        """Return the access rules, if there are any."""
        entry = self.entries.get(access_key(self.app))
        return entry.value if entry and isinstance(entry.value, AppMetadata) else None

    def worker(self, version: str) -> WorkerConfig | None:
        """Return the worker settings of a version, or of the app (an empty version), if there are any."""
        entry = self.entries.get(worker_key(self.app, version))
        return entry.value if entry and isinstance(entry.value, WorkerConfig) else None

    def ready(self, version: str) -> list[Instance]:
        """Return the registered instances of a version that have its content."""
        release = self.releases.get(version)
        return [each for each in self.instances.get(version, []) if release and each.serves(release)]

    def outdated(self, version: str) -> int:
        """Return how many registered instances of a version have loaded other content."""
        return len(self.instances.get(version, [])) - len(self.ready(version))

    def version_of(self, name: str) -> str:
        """Return the version that a version or an alias names; empty if there is none."""
        if name in self.releases:
            return name
        version = self.routing.aliases.get(name, "")
        return version if version in self.releases else ""

    def aliases_of(self, version: str) -> list[str]:
        return sorted(name for name, target in self.routing.aliases.items() if target == version)

    def production(self) -> list[Release]:
        """Return the versions in production that may get unversioned requests."""
        return [each for each in self.releases.values() if each.phase == "production" and each.weight != 0]

    def serving(self) -> list[Release]:
        """Return the versions that can answer unversioned requests now."""
        return [each for each in self.production() if self.ready(each.version)]

    def shares(self) -> list[Share]:
        """Return what each version in production gets: by weight if any has one, else by ready capacity."""
        production = [each for each in self.releases.values() if each.phase == "production"]
        capacity = {each.version: sum(one.capacity for one in self.ready(each.version)) for each in production}
        weighted = any(each.weight is not None for each in production)
        parts = {
            each.version: (1.0 if each.weight is None else each.weight) if weighted else float(capacity[each.version])
            for each in production
        }
        whole = sum(part for version, part in parts.items() if capacity[version])
        return [
            Share(
                each.version,
                each.weight,
                capacity[each.version],
                parts[each.version] / whole if whole and capacity[each.version] else 0.0,
            )
            for each in production
        ]


def older_instances(count: int) -> str:
    """Return what to do about instances that have loaded other content."""
    has, them = ("instance has", "it") if count == 1 else ("instances have", "them")
    return f"{count} {has} loaded other content: start {them} again to apply this"


def needs_new_instances(before: AppState, after: AppState) -> dict[str, str]:
    """Return, by key, which fields of releases change that the instances that run do not follow."""
    found = {}
    for version in before.releases.keys() & after.releases.keys():
        release = after.releases[version]
        fields = before.releases[version].differing(release)
        if fields and (count := after.outdated(version)):
            found[release.key] = f"{', '.join(fields)}: {older_instances(count)}"
    return found


def without_answers(before: AppState, after: AppState) -> dict[str, str]:
    """Return, by key, why what a change makes public answers nobody."""
    found = {}
    for version, release in after.releases.items():
        was = before.releases.get(version)
        if (
            release.phase == "production"
            and release.weight == 0
            and was
            and was.phase != "production"
            and not was.weight
        ):
            found[release.key] = "weight: 0, so it gets no requests without a version"
    unready = [
        f"aliases.{alias}: no instance of {version!r} is ready"
        for alias, version in after.routing.aliases.items()
        if before.routing.aliases.get(alias) != version in after.releases and not after.ready(version)
    ]
    if unready:
        found[app_routing_key(after.app)] = "; ".join(unready)
    return found


def access_key(app: str) -> str:
    """Return the key of the access rules of an app; without an app, that of the default rules."""
    return app_metadata_key(app) if app else f"{PREFIX}app/default/metadata"


def worker_key(app: str, version: str) -> str:
    """Return the key of the worker settings of a version, of an app, or of all apps."""
    of_version, of_app, of_all = worker_keys(app, version)
    return of_version if version else of_app if app else of_all


def ranges_of(app: str) -> tuple[list[str], list[str]]:
    """Return the prefixes and the keys of the config of an app, its instances last among the prefixes."""
    if not app:
        return [], [access_key(""), worker_key("", "")]
    prefixes = [release_key(app, ""), f"{PREFIX}worker/app/{app}/", f"{PREFIX}instance/{app}/"]
    return prefixes, [access_key(app), app_routing_key(app)]
