"""The config in files for git, as docs/config-in-git.md shows them, and its keys in etcd."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from atserving.cli.ops.client import INVALID, CommandError
from atserving.config import (
    DEFAULT_APP_METADATA_KEY,
    DEFAULT_WORKER_KEY,
    PREFIX,
    AppMetadata,
    AppRouting,
    MalformedConfig,
    Release,
    WorkerConfig,
    app_metadata_key,
    app_routing_key,
    check_names,
    is_name,
    read,
    release_key,
    worker_keys,
)
from atserving.errors import StartError

_FIELDS = [name for kind in (Release, AppMetadata, AppRouting, WorkerConfig) for name in kind.__struct_fields__]
_OMITTED = ("name", "version", "lastmodified")


@dataclass
class Tree:
    """The wanted config: the JSON of each key, by app; those of the defaults under an empty name."""

    apps: dict[str, dict[str, str]] = field(default_factory=dict)
    covers_all: bool = False
    """Whether the files have the defaults, too: then they stand for all apps."""


def to_fields(values: Mapping[str, str], app: str) -> dict[str, Any]:
    """Return the keys of one app, or of the defaults, as a document has them."""
    found: dict[str, Any] = {}
    releases: dict[str, dict[str, Any]] = {}
    for key, text in sorted(values.items()):
        fields = _ordered(orjson.loads(text))
        match key.removeprefix(PREFIX).split("/"):
            case ["eval", _, version]:
                kept = {name: value for name, value in fields.items() if name not in _OMITTED}
                releases.setdefault(version, {}).update(kept)
            case ["worker", "app", _, "release", version]:
                releases.setdefault(version, {})["worker"] = fields
            case ["worker", *_]:
                found["worker"] = fields
            case ["app", "routing", _]:
                found["routing"] = fields
            case ["app", *_]:
                found["access"] = fields
    ordered: dict[str, Any] = {name: found[name] for name in ("access", "routing", "worker") if name in found}
    return {**ordered, **({"releases": releases} if app and releases else {})}


def _ordered(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known fields in their own order, then others: files of the same config are the same."""
    known = [name for name in _FIELDS if name in fields]
    return {name: fields[name] for name in (*known, *sorted(fields.keys() - set(known)))}


def read_files(paths: Sequence[Path]) -> Tree:
    """Read files, or all files of folders. Raises CommandError, which names the file and the place in it."""
    tree = Tree()
    count = 0
    for path in _files(paths):
        for document in _documents(path):
            count += 1
            try:
                _take(tree, document)
            except ValueError as error:
                raise CommandError(f"{path}: {error}", INVALID) from None
    if not count:
        raise CommandError(f"{', '.join(map(str, paths))}: no document of config", INVALID)
    return tree


def warnings(tree: Tree) -> Iterator[str]:
    """Yield what is wrong with the values: errors first. Nothing is asked of a registry."""
    for values in tree.apps.values():
        for key, text in values.items():
            try:
                _, warning = read(key, text)
            except MalformedConfig as error:
                yield f"malformed: {key}: {error}"
            else:
                if warning:
                    yield f"warning: {key}: {warning}"


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(each for each in path.rglob("*") if each.suffix in (".yaml", ".yml", ".json"))
        else:
            yield path


def _documents(path: Path) -> list[Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise StartError("files of config need the package PyYAML: pip install '.[local]' in a checkout") from None
    loader: Any = _unique(yaml)
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text("utf-8")
        if path.suffix == ".json":
            # YAML takes 1e5 for a text.
            document = orjson.loads(text)
            check_names(text)
            return [document]
        return [each for each in yaml.load_all(text, loader) if each is not None]
    except OSError as error:
        raise CommandError(f"can't read {path}: {error.strerror}", 2) from None
    except (UnicodeDecodeError, orjson.JSONDecodeError) as error:
        raise CommandError(f"{path}: {error}", INVALID) from None
    except MalformedConfig as error:
        raise CommandError(f"{path}: {error}", INVALID) from None
    except (yaml.YAMLError, ValueError) as error:
        raise CommandError(f"{path}: not YAML: {' '.join(str(error).split())}", INVALID) from None


def _unique(yaml: Any) -> Any:
    """Return a loader of YAML for which a name that is there twice is an error, and a date a text."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # the library is imported when it is needed
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for name, _ in node.value:
                if not isinstance(name, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a name is no text", name.start_mark)
                if name.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name.value!r} is there twice", name.start_mark
                    )
                seen.add(name.value)
            return super().construct_mapping(node, deep)

    resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = resolvers
    return Loader


def _take(tree: Tree, document: Any) -> None:
    """Add a document. Raises ValueError."""
    _only(document, ("defaults", "apps"), "the document")
    if "defaults" in document:
        fields = document["defaults"] or {}
        _only(fields, ("access", "worker"), "defaults")
        keys = {"access": DEFAULT_APP_METADATA_KEY, "worker": DEFAULT_WORKER_KEY}
        _add(tree, "", {keys[name]: _json(value, f"defaults.{name}") for name, value in fields.items()})
        tree.covers_all = True
    apps = document.get("apps") or {}
    if not isinstance(apps, dict):
        raise ValueError("apps: should be an object")
    for app, fields in apps.items():
        where = f"apps.{app}"
        _check_name(app, where)
        _only(fields or {}, ("access", "routing", "worker", "releases"), where)
        _add(tree, app, dict(_keys(app, fields or {}, where)))


def _keys(app: str, fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    of_app = {"access": app_metadata_key(app), "routing": app_routing_key(app), "worker": worker_keys(app, "")[1]}
    for name, key in of_app.items():
        if name in fields:
            yield key, _json(fields[name], f"{where}.{name}")
    releases = fields.get("releases") or {}
    if not isinstance(releases, dict):
        raise ValueError(f"{where}.releases: should be an object")
    for version, release in releases.items():
        place = f"{where}.releases.{version}"
        _check_name(version, place)
        if not isinstance(release, dict):
            raise ValueError(f"{place}: should be an object")
        own = {name: value for name, value in release.items() if name != "worker"}
        if own:
            yield release_key(app, version), _json({"name": app, "version": version, **own}, place)
        if "worker" in release:
            yield worker_keys(app, version)[0], _json(release["worker"], f"{place}.worker")


def _add(tree: Tree, app: str, values: dict[str, str]) -> None:
    if app in tree.apps:
        raise ValueError(f"{f'app {app!r}' if app else 'defaults'}: in another document, too")
    tree.apps[app] = values


def _json(value: Any, where: str) -> str:
    try:
        # orjson writes null for what is no number.
        json.dumps(value, allow_nan=False)
        return orjson.dumps(value).decode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from None


def _only(fields: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: should be an object")
    for name in fields:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}; known are {', '.join(known)}")


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(f"{where}: the name {name!r} should be a text that matches [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}")
