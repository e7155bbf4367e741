"""The command ``atserving top``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import orjson

from atserving.cli.ops.options import flag
from atserving.cli.service import finite
from atserving.cli.tables import printable
from atserving.cli.top import screen, tables
from atserving.cli.top.changes import Changes, Reading, as_json
from atserving.cli.top.scraping import Target, resolve, scrape_all
from atserving.errors import StartError
from atserving.local.folders import TARGETS_FILE, local_meshes

_JOBS = ("gate", "evaluator", "registry")
_LEAST_S, _MOST_S = 0.2, 3600.0


class _Group(msgspec.Struct):
    """An entry of Prometheus' file_sd_configs."""

    targets: list[str]
    labels: dict[str, str] = {}


@click.command(
    help="Show what apps, versions and instances do now, from the metrics of their processes: by default those of "
    "`atserving up` on this machine. APP: only this one.",
    short_help="Show what apps, versions and instances do now.",
)
@click.argument("app", default="")
@flag(
    "--target",
    "targets",
    multiple=True,
    metavar="HOST:PORT",
    help="The --http of a gate, an evaluator or a registry, in place of the local mesh; all addresses of a name. "
    "Repeatable.",
)
@flag(
    "--targets",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A file of Prometheus' file_sd_configs with the targets.",
)
@flag(
    "--interval",
    type=click.FloatRange(_LEAST_S, _MOST_S),
    callback=finite,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@flag("-i", "--instances", is_flag=True, help="Show each instance, too.")
@flag("--once", is_flag=True, help="Print one table after one interval, and end. So it is without a terminal.")
@flag("-o", "--format", "format_", type=click.Choice(["table", "json"]), default="table", help="Default: table.")
def top(
    app: str,
    targets: Sequence[str],
    file: Path | None,
    interval: float,
    instances: bool,
    once: bool,
    format_: str,
) -> None:
    if targets and file:
        raise click.UsageError("--target and --targets exclude each other")
    find = _finder(targets, file)
    # Before the first table: it may not be found.
    find()
    changes = Changes()

    def read() -> Reading | None:
        # The targets of a file, and the addresses of names, may change.
        return changes.read(scrape_all(find()), time.monotonic())

    if format_ == "table" and not once and sys.stdout.isatty():
        screen.show(read, interval, app, instances=instances)
        return
    read()
    while True:
        time.sleep(interval)
        reading = read()
        assert reading
        if format_ == "json":
            click.echo(orjson.dumps(_of_app(as_json(reading), app)).decode())
        else:
            _print(reading, app, instances)
        if once or format_ == "table":
            break
    if not any(reading.processes.values()):
        why = printable(reading.warnings[0]) if reading.warnings else "there is no target"
        raise StartError(f"no process answers: {why}")


def _finder(names: Sequence[str], file: Path | None) -> Callable[[], list[Target]]:
    """Return what returns the targets. Raises StartError and UsageError."""
    if names:
        for name in names:
            host, _, port = name.rpartition(":")
            if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 65536):
                raise click.BadParameter(f"{name!r} is not host:port", param_hint="--target")
        return lambda: resolve(names)
    chosen = file or _local()
    return lambda: _of_file(chosen)


def _local() -> Path:
    """Return the file of the only local mesh that answers. Raises StartError."""
    folders = local_meshes()
    answering = [each for each in folders if any(found.kind for found in scrape_all(_of_file(each / TARGETS_FILE)))]
    if not answering:
        raise StartError("no mesh of `atserving up` runs on this machine: name the processes with --target HOST:PORT")
    if len(answering) > 1:
        files = " or ".join(str(each / TARGETS_FILE) for each in answering)
        raise StartError(f"several meshes run on this machine: choose one with --targets {files}")
    return answering[0] / TARGETS_FILE


def _of_file(path: Path) -> list[Target]:
    """Return the targets of a file: gates, evaluators, registries, and those without a job. Raises StartError."""
    try:
        groups = msgspec.json.decode(path.read_bytes(), type=list[_Group])
    except OSError as error:
        raise StartError(f"can't read {path}: {os.strerror(error.errno or 0)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartError(f"{path} is no file of file_sd_configs in JSON: {error}") from None
    return [
        Target(address, each.labels.get("process", address))
        for each in groups
        if each.labels.get("job", _JOBS[0]) in _JOBS
        for address in each.targets
    ]


def _of_app(document: dict[str, Any], app: str) -> dict[str, Any]:
    if app:
        document["loads"] = [each for each in document["loads"] if each.get("app") == app]
    return document


def _print(reading: Reading, app: str, instances: bool) -> None:
    found = [cells for _, cells in tables.rows(reading, app, instances=instances)]
    columns = tables.widths([tables.HEADERS, *found])
    click.echo(tables.header(reading))
    for cells in (tables.HEADERS, *found):
        click.echo(tables.aligned(cells, columns))
    for warning in reading.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
