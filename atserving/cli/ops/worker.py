"""``atserving worker``: the worker settings of all apps, of an app, or of a version."""

from __future__ import annotations

from typing import Any

import click
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing, settings
from atserving.cli.ops.options import Read, Write, flag, reading, writing
from atserving.field_types import parse_duration


def _duration(text: str) -> Duration:
    found = Duration()
    found.FromTimedelta(parse_duration(text))
    return found


def _hosts(text: str) -> admin_pb2.Worker.Hosts:
    return admin_pb2.Worker.Hosts(hosts=[each for each in text.split(",") if each])


_FIELDS: dict[str, settings.Parse] = {
    "timeout": _duration,
    "max_concurrent": settings.whole,
    "delay4batch": _duration,
    "wait_for_instance": _duration,
    "fetch_allow": _hosts,
    "fetch_deny": _hosts,
    "scripts": str,
}


@click.group(help="Show and set the timeout, capacity and hosts of instances, and whether scripts may run.")
def worker() -> None:
    pass


def _level(app: str, version: str) -> str:
    return " ".join(name for name in (app, version) if name) or "all apps"


@worker.command(help="Show the settings that apply to VERSION of APP, and where each comes from; or one level's own.")
@completion.app(default="")
@completion.version(default="")
@reading
def show(read: Read, app: str, version: str) -> None:
    if version:
        request = admin_pb2.GetMergedWorkerRequest(app=app, version=version)
        merged = read.servers.read(lambda stub: stub.GetMergedWorker, request)
        if read.is_for_programs:
            read.print(merged)
            return
        levels = admin_pb2.MergedWorker.Level
        printing.rows(
            ("SETTING", "VALUE", "FROM", "KEY"),
            [
                (
                    each.name,
                    each.value_json.strip('"'),
                    levels.Name(each.level).removeprefix("LEVEL_").lower().replace("_", " "),
                    each.key or "-",
                )
                for each in merged.settings
            ],
        )
        return
    found = read.servers.read(lambda stub: stub.GetWorker, admin_pb2.GetWorkerRequest(app=app))
    if read.is_for_programs:
        read.print(found)
    else:
        values = printing.as_dict(found)
        printing.rows(("SETTING", "VALUE"), [(name, _shown(values.get(name, "-"))) for name in _FIELDS])
    printing.warn(found)


def _shown(value: object) -> str:
    return ",".join(value.get("hosts", ())) or "none" if isinstance(value, dict) else str(value)


@worker.command("set", help="Set fields for all apps, for APP, or for VERSION: timeout=2s max_concurrent=32")
@settings.arguments(2, _FIELDS)
@writing
def set_(write: Write, wanted: tuple[list[str], dict[str, Any]]) -> None:
    names, fields = wanted
    app, version = [*names, "", ""][:2]
    request = admin_pb2.UpdateWorkerRequest(
        worker=admin_pb2.Worker(app=app, version=version, **fields), update_mask=FieldMask(paths=list(fields))
    )
    write.call(lambda stub: stub.UpdateWorker, request)
    write.tell(f"the worker settings of {_level(app, version)} are set")


@worker.command(help="Remove the settings of all apps, of APP, or of VERSION, so that the next level applies.")
@completion.app(default="")
@completion.version(default="")
@flag("--field", "fields", multiple=True, type=click.Choice(list(_FIELDS)), help="Remove only this one; repeatable.")
@writing
def unset(write: Write, app: str, version: str, fields: tuple[str, ...]) -> None:
    if fields:
        write.call(
            lambda stub: stub.UpdateWorker,
            admin_pb2.UpdateWorkerRequest(
                worker=admin_pb2.Worker(app=app, version=version), update_mask=FieldMask(paths=fields)
            ),
        )
    else:
        write.call(lambda stub: stub.DeleteWorker, admin_pb2.DeleteWorkerRequest(app=app, version=version))
    write.tell(f"{', '.join(fields) or 'the worker settings'} of {_level(app, version)}: removed")
