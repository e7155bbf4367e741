"""Checks a release on this machine before it is published, with the evaluator's own code where that is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops.client import INVALID, CommandError
from atserving.cli.tables import printable
from atserving.config import MalformedConfig, Release, validate
from atserving.errors import StartError
from atserving.telemetry import configure_logging

_MARK = "#sha256="
_QINIU = "qiniu://"


def with_digests(fields: Mapping[str, Any], stored: admin_pb2.Release | None, *, check: bool) -> dict[str, Any]:
    """Return the fields of a release, as etcd has them, with the digest of each file; print what looks wrong.

    ``stored`` is what is published under the name of the release: what it has no digest of gets none. Without a
    ``check``, only files whose digest is stored have one. Raises CommandError if the release can't work.
    """
    try:
        release = validate(Release, fields)
    except MalformedConfig as error:
        raise CommandError(str(error), INVALID) from None
    digests = _checked(release) if check else {}
    known = dict(_uris({"file": stored.file, "custom_files": stored.custom_files})) if stored else {}

    def digested(field: str, uri: str) -> str:
        same = known.get(field, "")
        if _MARK in uri or (_bare(same) == uri and _MARK not in same):
            return uri
        if field in digests:
            return f"{_bare(uri)}{_MARK}{digests[field]}"
        return same if _bare(same) == uri else uri

    new = {field: digested(field, uri) for field, uri in _uris(fields)}
    files = {name: new[f"custom_files.{name}"] for name in fields.get("custom_files") or {}}
    return {**fields, "file": new["file"], **({"custom_files": files} if files else {})}


def _checked(release: Release) -> Mapping[str, str]:
    """Return the sha256 of each file by its field; of none if nothing can be checked here. Raises CommandError."""
    if away := [uri for uri in (release.file, *release.custom_files.values()) if uri.startswith(_QINIU)]:
        # Only the keys of its owner can read it.
        _warn(f"the release is not checked: {away[0]} can't be read from here")
        return {}
    try:
        (check,) = (each.load() for each in entry_points(group="atserving.checks", name="release"))
    except (ImportError, ValueError) as error:
        missing = getattr(error, "name", None) or "the evaluator"
        _warn(f"the release is not checked: {missing} is not installed here: pip install '.[cpu]' in a checkout")
        return {}
    # What the evaluator's code logs is no output of the command.
    configure_logging("atserving", "error")
    if sys.stderr.isatty():
        click.echo(f"checking {printable(_bare(release.file))} ...", err=True)
    try:
        found = check(release)
    except StartError as error:
        raise CommandError(f"{error} (--no-check publishes it as it is)", INVALID) from None
    for warning in found.warnings:
        _warn(warning)
    digests: Mapping[str, str] = found.digests
    return digests


def _uris(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", fields["file"]
    for name, uri in (fields.get("custom_files") or {}).items():
        yield f"custom_files.{name}", uri


def _bare(uri: str) -> str:
    return uri.partition(_MARK)[0].rstrip("#")


def _warn(text: str) -> None:
    click.echo(f"warning: {printable(text)}", err=True)
