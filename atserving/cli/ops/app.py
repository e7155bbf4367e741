"""``atserving app``: apps and their aliases."""

from __future__ import annotations

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing
from atserving.cli.ops.client import pages
from atserving.cli.ops.options import Read, Write, flag, reading, writing


@click.group(help="List apps, show how their requests are shared, set aliases.")
def app() -> None:
    pass


@app.command("list", help="List the apps.")
@flag("--filter", "part", default="", metavar="TEXT", help="List only names with this part.")
@reading
def list_(read: Read, part: str) -> None:
    request = admin_pb2.ListAppsRequest(filter=part)
    found = [each for page in pages(read.servers, lambda stub: stub.ListApps, request) for each in page.apps]
    if read.as_json:
        printing.json({"apps": [printing.as_dict(each) for each in found]})
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
    if read.as_json:
        printing.json(found)
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


@app.command(help="Delete all config of APP: releases, access rules, worker settings, aliases.")
@completion.app()
@writing
def delete(write: Write, app: str) -> None:
    write.call(lambda stub: stub.DeleteApp, admin_pb2.DeleteAppRequest(app=app))
    write.tell(f"{app} is deleted")
