"""The history of an app, and what changes now."""

from __future__ import annotations

from itertools import islice

import click
from google.protobuf.message import Message

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing
from atserving.cli.ops.client import pages
from atserving.cli.ops.options import Read, flag, reading
from atserving.cli.tables import styled
from atserving.config import PREFIX

defaults_flag = flag("--defaults", is_flag=True, help="In place of APP: the settings of all apps, and their access.")


def check_defaults(app: str, defaults: bool) -> None:
    """Raise UsageError unless either an app or the defaults are named."""
    if bool(app) == defaults:
        raise click.UsageError("name APP, or --defaults")


@click.command(help="List the changes of APP, the newest first; of all apps with -.")
@completion.app(default="")
@flag("-n", "--most", type=click.IntRange(1), default=20, show_default=True, help="How many changes to list.")
@defaults_flag
@reading
def history(read: Read, app: str, most: int, defaults: bool) -> None:
    check_defaults(app, defaults)
    request = admin_pb2.ListHistoryRequest(app=app)
    all_pages = pages(read.servers, lambda stub: stub.ListHistory, request)
    found = list(islice((change for page in all_pages for change in page.changes), most))
    if read.is_for_programs:
        read.print({"changes": [printing.as_dict(each) for each in found]})
        return
    printing.rows(
        ("REVISION", "TIME", "APP", "ACTOR", "METHOD", "KEYS", "MESSAGE"),
        [
            (
                each.revision,
                printing.moment(each.time),
                each.app or "-",
                printing.text(each.actor or "-"),
                each.method or ("etcd" if each.actor_kind == admin_pb2.Change.ACTOR_KIND_ETCD else "-"),
                "\n".join(_key(key) for key in each.keys),
                printing.text(each.message),
            )
            for each in found
        ],
    )


def _key(change: admin_pb2.KeyChange) -> str:
    sign = " " if change.omitted else "~"
    if not change.omitted and not change.HasField("before"):
        sign = "+"
    elif not change.omitted and not change.HasField("after"):
        sign = "-"
    return f"{sign} {printing.text(change.key.removeprefix(PREFIX))}"


@click.command(help="Print what APP has, then each change, until Ctrl-C; of all apps with -.")
@completion.app()
@reading
def watch(read: Read, app: str) -> None:
    synced = False
    for response in read.servers.stream(lambda stub: stub.WatchApp, admin_pb2.WatchAppRequest(app=app)):
        if read.is_for_programs:
            printing.document(response, read.format, one_of_many=True)
        elif response.synced:
            synced = True
            click.echo(styled("-- changes from here on", dim=True))
        else:
            click.echo(_line(response, is_new=synced))


def _line(response: admin_pb2.WatchAppResponse, *, is_new: bool) -> str:
    kind = response.WhichOneof("object") or ""
    message: Message = getattr(response, kind)
    names = [getattr(message, name, "") for name in (("name",) if kind == "app" else ("app", "version", "id"))]
    what = f"{kind} {'/'.join(name for name in names if name) or 'defaults'}"
    if response.deleted:
        return styled(f"{what} is gone", fg="red")
    shown = {name: value for name, value in printing.as_dict(message).items() if name not in _NAMES}
    return f"{styled(what, bold=is_new)} {printing.compact(shown)}"


_NAMES = ("app", "name", "version", "id", "etag")
