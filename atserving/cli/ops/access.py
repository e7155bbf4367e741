"""``atserving access``: who may call an app."""

from __future__ import annotations

from typing import Any

import click
from google.protobuf.field_mask_pb2 import FieldMask

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops import completion, printing, settings
from atserving.cli.ops.options import Read, Write, flag, reading, writing


def _uids(text: str) -> admin_pb2.Access.Users:
    return admin_pb2.Access.Users(uids=[settings.whole(each) for each in text.split(",") if each])


def _owner(text: str) -> admin_pb2.Access.Owner:
    return admin_pb2.Access.Owner(uid=settings.whole(text))


def _groups(text: str) -> admin_pb2.Access.Groups:
    return admin_pb2.Access.Groups(names=[each for each in text.split(",") if each])


_FIELDS: dict[str, settings.Parse] = {
    "public": settings.boolean,
    "owner": _owner,
    "user_whitelist": _uids,
    "group_whitelist": _groups,
    "max_requests_per_second": settings.number,
    "max_in_flight": settings.whole,
    "max_bytes_per_minute": settings.size,
}
_LIMITS = ("max_requests_per_second", "max_in_flight", "max_bytes_per_minute")


@click.group(help="Show and set who may call an app.")
def access() -> None:
    pass


def _whose(app: str) -> str:
    return app or "apps without their own"


@access.command(help="Show the rules of APP; without it, the rules of apps without their own.")
@completion.app(default="")
@reading
def show(read: Read, app: str) -> None:
    found = read.servers.read(lambda stub: stub.GetAccess, admin_pb2.GetAccessRequest(app=app))
    if read.is_for_programs:
        read.print(found)
    else:
        values = printing.as_dict(found)
        groups = ", ".join(map(printing.text, found.group_whitelist.names)) or "nobody"
        uids = ", ".join(map(str, found.user_whitelist.uids)) or "nobody"
        printing.rows(
            ("RULE", "VALUE"),
            [
                ("public", str(found.public).lower() if found.HasField("public") else "-"),
                ("owner", str(found.owner.uid) if found.HasField("owner") else "-"),
                ("user_whitelist", uids if found.HasField("user_whitelist") else "-"),
                ("group_whitelist", groups if found.HasField("group_whitelist") else "-"),
                *((name, str(values.get(name, "-"))) for name in _LIMITS),
            ],
        )
    if found.malformed:
        click.echo(printing.text(f"malformed: {found.malformed}; the app is closed"), err=True)
    printing.warn(found)


@access.command(
    "set",
    help="Set rules of APP, or of apps without their own: public=false owner=1 user_whitelist=1,2 group_whitelist=a,b",
)
@settings.arguments(1, _FIELDS)
@writing
def set_(write: Write, wanted: tuple[list[str], dict[str, Any]]) -> None:
    names, fields = wanted
    app = names[0] if names else ""
    request = admin_pb2.UpdateAccessRequest(
        access=admin_pb2.Access(app=app, **fields), update_mask=FieldMask(paths=list(fields))
    )
    write.call(lambda stub: stub.UpdateAccess, request)
    write.tell(f"the access rules of {_whose(app)} are set")


@access.command(help="Remove the rules of APP, or of apps without their own.")
@completion.app(default="")
@flag("--field", "fields", multiple=True, type=click.Choice(list(_FIELDS)), help="Remove only this one; repeatable.")
@writing
def unset(write: Write, app: str, fields: tuple[str, ...]) -> None:
    if fields:
        request = admin_pb2.UpdateAccessRequest(
            access=admin_pb2.Access(app=app), update_mask=FieldMask(paths=list(fields))
        )
        write.call(lambda stub: stub.UpdateAccess, request)
    else:
        write.call(lambda stub: stub.DeleteAccess, admin_pb2.DeleteAccessRequest(app=app))
    write.tell(f"{', '.join(fields) or 'the access rules'} of {_whose(app)}: removed")
