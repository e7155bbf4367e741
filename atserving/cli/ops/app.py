"""``atserving app``: apps and their aliases."""

from __future__ import annotations

import click
from google.protobuf.field_mask_pb2 import FieldMask

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing
from atserving.cli.ops.client import NOT_FOUND, CommandError, pages
from atserving.cli.ops.options import Read, Write, flag, reading, writing
from atserving.config import DEFAULT_KEY_HEADER


@click.group(help="List apps, show how their requests are shared, set aliases and shadows.")
def app() -> None:
    pass


@app.command("list", help="List the apps.")
@flag("--filter", "part", default="", metavar="TEXT", help="List only names with this part.")
@reading
def list_(read: Read, part: str) -> None:
    request = admin_pb2.ListAppsRequest(filter=part)
    found = [each for page in pages(read.servers, lambda stub: stub.ListApps, request) for each in page.apps]
    if read.is_for_programs:
        read.print({"apps": [printing.as_dict(each) for each in found]})
    else:
        printing.rows(
            ("APP", "RELEASES", "INSTANCES", "SHARES", "ALIASES"),
            [
                (
                    each.name,
                    str(each.releases),
                    str(each.instances),
                    ", ".join(f"{share.version} {share.share:.1%}" for share in each.shares) or "-",
                    _aliases(each) or "-",
                )
                for each in found
            ],
        )
    for one in found:
        printing.warn(one)


def _aliases(found: admin_pb2.App) -> str:
    return ", ".join(f"{alias}={version}" for alias, version in sorted(found.aliases.items()))


@app.command(help="Show APP: the shares of its versions, and its aliases.")
@completion.app()
@reading
def show(read: Read, app: str) -> None:
    found = read.servers.read(lambda stub: stub.GetApp, admin_pb2.GetAppRequest(app=app))
    if read.is_for_programs:
        read.print(found)
    else:
        printing.fields(
            [
                ("app", found.name),
                ("releases", str(found.releases)),
                ("instances", str(found.instances)),
                ("aliases", _aliases(found)),
                ("key header", printing.text(found.key_header)),
                ("shadow", f"{found.shadow.version} {found.shadow.percent:g}%" if found.HasField("shadow") else ""),
                ("etag", found.etag),
            ]
        )
        if found.shares:
            click.echo()
            printing.shares(found)
    printing.warn(found)


def _change(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, str]:
    name, is_set, version = value.partition("=")
    if is_set and name and version:
        return name, version
    if not is_set and value.endswith("-") and len(value) > 1:
        return value[:-1], ""
    raise click.BadParameter(f"{value!r} should be NAME=VERSION, or NAME- to remove it", context, parameter)


@app.command(help="Let the alias NAME of APP point to VERSION, or remove it: NAME-")
@completion.app()
@completion.argument("alias", completion.aliases, callback=_change, metavar="NAME=VERSION|NAME-")
@writing
def alias(write: Write, app: str, alias: tuple[str, str]) -> None:
    name, version = alias
    if version:
        write.call(lambda stub: stub.SetAlias, admin_pb2.SetAliasRequest(app=app, alias=name, version=version))
        write.tell(f"{app} {name} is {version}")
    else:
        write.call(lambda stub: stub.DeleteAlias, admin_pb2.DeleteAliasRequest(app=app, alias=name))
        write.tell(f"{app} {name} is removed")


def _shadow(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, float]:
    version, is_set, percent = value.rpartition("=")
    if not is_set and value.endswith("-") and len(value) > 1:
        return value[:-1], 0.0
    try:
        if version:
            return version, float(percent.removesuffix("%"))
    except ValueError:
        pass
    raise click.BadParameter(f"{value!r} should be VERSION=PERCENT, or VERSION- to end it", context, parameter)


@app.command(
    help="Copy PERCENT of the requests for APP without a version to VERSION, which is in staging, and compare its "
    "answers; or end it: VERSION-"
)
@completion.app()
@completion.argument("shadow", completion.weights, callback=_shadow, metavar="VERSION=PERCENT|VERSION-")
@flag("--score-tolerance", type=click.FloatRange(0, 1), help="By how much scores may differ. Default: 0.01.")
@flag("--box-tolerance", type=click.FloatRange(0), help="By how many pixels boxes may differ. Default: 2.")
@writing
def shadow(
    write: Write, app: str, shadow: tuple[str, float], score_tolerance: float | None, box_tolerance: float | None
) -> None:
    version, percent = shadow
    message = admin_pb2.App(name=app)
    if not percent:
        current = write.servers.read(lambda stub: stub.GetApp, admin_pb2.GetAppRequest(app=app))
        if current.shadow.version != version:
            raise CommandError(f"{version} is no shadow of {app}: {current.shadow.version or 'it has none'}", NOT_FOUND)
        message.etag = current.etag
    if percent:
        message.shadow.CopyFrom(
            admin_pb2.Shadow(
                version=version, percent=percent, score_tolerance=score_tolerance, box_tolerance=box_tolerance
            )
        )
    write.call(lambda stub: stub.UpdateApp, admin_pb2.UpdateAppRequest(app=message, update_mask=_mask("shadow")))
    write.tell(f"{version} gets copies of {percent:g}% of {app}'s requests" if percent else f"{app} has no shadow")


@app.command("key-header", help="Name the request header by whose value callers of APP keep their version.")
@completion.app()
@click.argument("header", required=False, default="", metavar="[HEADER]")
@writing
def key_header(write: Write, app: str, header: str) -> None:
    header = header.lower()
    message = admin_pb2.App(name=app, key_header=header)
    write.call(lambda stub: stub.UpdateApp, admin_pb2.UpdateAppRequest(app=message, update_mask=_mask("key_header")))
    write.tell(f"callers of {app} keep their version by the header {header or DEFAULT_KEY_HEADER}")


def _mask(path: str) -> FieldMask:
    return FieldMask(paths=[path])


@app.command(help="Delete all config of APP: releases, access rules, worker settings, aliases.")
@completion.app()
@writing
def delete(write: Write, app: str) -> None:
    write.call(lambda stub: stub.DeleteApp, admin_pb2.DeleteAppRequest(app=app))
    write.tell(f"{app} is deleted")
