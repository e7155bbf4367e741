"""`atserving logs`: all that the processes of a mesh have logged of one request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import click
import orjson

from atserving.cli.ops.options import flag
from atserving.cli.tables import printable, styled
from atserving.errors import StartError
from atserving.local.folders import local_meshes

_FIRST = ("timestamp", "level", "service", "event", "reqid")
_MOST_LINE_BYTES = 1 << 20
_LEVELS = {"warning": "yellow", "error": "red"}
_UNKNOWN = datetime.min.replace(tzinfo=UTC)


@click.command(
    help="Print every line of the request REQID, in the order of time, from the logs of the meshes of `atserving up` "
    "on this machine, or from FILEs; - is standard input, such as the output of kubectl logs.",
    short_help="Print every line of one request.",
)
@click.argument("reqid")
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(path_type=Path, allow_dash=True))
@flag("-o", "--format", "format_", type=click.Choice(["text", "json"]), default="text", help="Default: text.")
def logs(reqid: str, files: Sequence[Path], format_: str) -> None:
    searched = list(files) or [log for folder in local_meshes() for log in sorted(folder.glob("*.log"))]
    if not searched:
        raise StartError(
            "no mesh of `atserving up` runs on this machine: name the files of logs, or - for standard input"
        )
    found = sorted(_found(reqid, searched), key=_moment)
    if not found:
        where = f"{len(searched)} files have" if len(searched) > 1 else f"{searched[0]} has"
        raise StartError(f"{where} no line of a request {printable(reqid)}")
    for line in found:
        click.echo(orjson.dumps(line).decode() if format_ == "json" else _text(line))


def _found(reqid: str, files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a request. Raises StartError."""
    for path in files:
        try:
            if str(path) == "-":
                yield from _of_request(reqid, sys.stdin.buffer)
            else:
                with path.open("rb") as file:
                    yield from _of_request(reqid, file)
        except OSError as error:
            raise StartError(f"can't read {path}: {os.strerror(error.errno or 0)}") from None


def _of_request(reqid: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    inside = orjson.dumps(reqid)
    while raw := file.readline(_MOST_LINE_BYTES):
        if inside not in raw:
            continue
        # `kubectl logs --prefix` writes the pod before the line.
        start = raw.find(b"{")
        # TypeError: orjson reads deeper values than it writes. No process of ours logs any.
        with suppress(orjson.JSONDecodeError, TypeError):
            line = orjson.loads(raw[max(start, 0) :])
            if isinstance(line, dict) and line.get("reqid") == reqid:
                orjson.dumps(line)
                yield line


def _moment(line: dict[str, Any]) -> datetime:
    """Return when a line was written; Envoy's: when the request arrived."""
    try:
        found = datetime.fromisoformat(str(line.get("timestamp")))
    except ValueError:
        return _UNKNOWN
    try:
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except OverflowError:
        return _UNKNOWN


def _text(line: dict[str, Any]) -> str:
    """Return a line for people: when, who, what, and then every other field that has a value."""
    moment = _moment(line)
    time = "-" if moment == _UNKNOWN else f"{moment:%H:%M:%S.%f}"[:-3]
    level = str(line.get("level", "info"))
    # Envoy's lines have no event.
    event = printable(str(line.get("event") or f"{line.get('method', '')} {line.get('path', '')}".strip() or "-"))
    others = [
        f"{printable(name)}={_value(value)}"
        for name, value in line.items()
        if name not in _FIRST and value not in ("", None) and not (name in ("method", "path") and "event" not in line)
    ]
    service = printable(str(line.get("service", "-"))).ljust(9)
    return " ".join([time, service, styled(event, bold=True, fg=_LEVELS.get(level)), *others])


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return printable(text) if text and " " not in text else repr(printable(text))
