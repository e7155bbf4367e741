"""Config that is well-formed and has no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from atserving.config import (
    AppMetadata,
    AppRouting,
    ConfigValue,
    Release,
    WorkerConfig,
    release_key,
    worker_keys,
)

_BATCH_SIZE = "batch_size: no service reads it; a release has one"


def ineffective(app: str, values: Mapping[str, ConfigValue], malformed: Mapping[str, str]) -> dict[str, str]:
    """Return why keys of an app (empty: the defaults) have no effect, or not all of it.

    ``values`` are those of the app by key, instances aside; ``malformed`` are its keys that may have none.
    """
    phases = {each.version: each.phase for each in values.values() if isinstance(each, Release)}
    versions = phases.keys() | {key.removeprefix(release_key(app, "")) for key in malformed}
    found: dict[str, str] = {}
    for key, value in values.items():
        match value:
            case AppMetadata():
                reasons = [_BATCH_SIZE] if value.batch_size else []
            case WorkerConfig() if app:
                of_app = key == worker_keys(app, "")[1]
                version = "" if of_app else key.rpartition("/")[2]
                reasons = [] if of_app or version in versions else [f"the app has no version {version!r}"]
            case AppRouting():
                reasons = list(_routing(value, phases))
            case _:
                continue
        if app and not versions:
            reasons = ["the app has no release"]
        if reasons:
            found[key] = "; ".join(reasons)
    return found


def _routing(routing: AppRouting, phases: Mapping[str, str]) -> Iterator[str]:
    for alias, version in routing.aliases.items():
        if version not in phases:
            yield f"aliases.{alias}: the app has no version {version!r}"
        elif alias in phases:
            yield f"aliases.{alias}: a version has this name"
    shadow = routing.shadow
    if shadow and shadow.version not in phases:
        yield f"shadow: the app has no version {shadow.version!r}"
    elif shadow and phases[shadow.version] != "staging":
        yield f"shadow: version {shadow.version!r} is in production"
