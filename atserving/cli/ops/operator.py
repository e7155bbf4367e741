"""``atserving operator``: who may operate, in etcd, or in the file of a registry."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import orjson

from atserving import operators
from atserving.admin.v1 import admin_pb2
from atserving.cli import contexts
from atserving.cli.ops import printing
from atserving.cli.ops.client import NOT_FOUND, CommandError, Servers, pages
from atserving.cli.ops.options import Read, Write, flag, reading, writing
from atserving.errors import StartError

_WAYS = ("token_sha256", "certificate", "issuer", "subject", "group")
_ABSENT = "0"

_Entry = dict[str, Any]


@click.group(help="Say who may operate: in etcd, for all registries, or with --file in the file of a registry.")
def operator() -> None:
    pass


@operator.command("list", help="List the operators of etcd, and those of the file of the registry that answers.")
@reading
def list_(read: Read) -> None:
    found = _all(read.servers)
    if read.is_for_programs:
        read.print({"operators": [printing.as_dict(each) for each in found]})
        return
    printing.rows(
        ("NAME", "ROLE", "KNOWN BY", "KEPT IN"),
        [(each.name, printing.role(each), _way(each), "file" if each.in_file else "etcd") for each in found],
    )


def _changing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take the fields of an operator, as its argument ``given``, and ``--file``."""

    @wraps(function)
    def command(issuer: str, subject: str, group: str, certificate: str, **others: Any) -> Any:
        given = {"issuer": issuer, "subject": subject, "group": group, "certificate": certificate}
        given = {name: value for name, value in given.items() if value is not None}
        if given and given.keys() not in ({"certificate"}, {"issuer", "subject"}, {"issuer", "group"}):
            raise click.UsageError("take --certificate, or --issuer with --subject, or --issuer with --group")
        return function(given=given, **others)

    for option in (
        _file,
        flag("--group", metavar="TEXT", help="All whose tokens of --issuer name this group."),
        flag("--subject", metavar="TEXT", help="Who has tokens of --issuer with this subject."),
        flag("--issuer", metavar="NAME", help="An issuer of tokens, as the registry's file names it."),
        flag("--certificate", metavar="URI", help="Who has a certificate with this URI in its SAN."),
        flag("--app", "apps", multiple=True, metavar="APP|PREFIX*", help="Of a publisher; repeatable."),
    ):
        command = option(command)
    return command


_file = flag(
    "--file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Change this file, and no registry."
)
_name = click.argument("name")


def _role(default: str | None) -> Callable[[Any], Any]:
    return flag("--role", type=click.Choice(printing.ROLES), default=default, show_default=bool(default))


@operator.command(help="Add NAME. Unless a flag tells who it is, print a new token: nobody can read it later.")
@_name
@_role("viewer")
@_changing
@writing
def add(write: Write, name: str, role: str, apps: tuple[str, ...], given: _Entry, file: Path | None) -> None:
    _check_apps(role, apps)
    token = "" if given else secrets.token_urlsafe(32)
    entry = {"name": name, "role": role, "apps": list(apps), **given, **_digest(token)}
    if file:
        known = _read(file)
        if _index(known, name) is not None:
            raise StartError(f"{file} has an operator {name!r}: atserving operator set changes it")
        known["operators"].append(_in_file(entry))
        _save(write, file, known)
    else:
        _put(write, entry, _ABSENT)
    _tell(write, token, f"{name} is added")


@operator.command("set", help="Change NAME: its role, its apps, what tells who it is.")
@_name
@_role(None)
@flag("--new-token", is_flag=True, help="Print a new token, in place of the one it has.")
@_changing
@writing
def set_(
    write: Write,
    name: str,
    role: str | None,
    apps: tuple[str, ...],
    new_token: bool,
    given: _Entry,
    file: Path | None,
) -> None:
    if new_token and given:
        raise click.UsageError("--new-token goes without another way to tell who it is")
    token = secrets.token_urlsafe(32) if new_token else ""
    before, etag, known = _before(write, file, name)
    role = role or before.get("role", "viewer")
    apps = apps or tuple(before.get("apps", ()) if role == "publisher" else ())
    _check_apps(role, apps)
    way = {**given, **_digest(token)}
    kept = {} if way else {each: before[each] for each in _WAYS if before.get(each)}
    entry = {"name": name, "role": role, "apps": list(apps), **kept, **way}
    if file:
        known["operators"][_index(known, name)] = _in_file(entry)
        _save(write, file, known)
    else:
        _put(write, entry, etag)
    _tell(write, token, f"{name} is changed")


@operator.command(help="Remove NAME.")
@_name
@_file
@writing
def remove(write: Write, name: str, file: Path | None) -> None:
    if file:
        _, _, known = _before(write, file, name)
        del known["operators"][_index(known, name)]
        _save(write, file, known)
    else:
        write.call(lambda stub: stub.DeleteOperator, admin_pb2.DeleteOperatorRequest(name=name))
    write.tell(f"{name} is removed")


def _check_apps(role: str, apps: tuple[str, ...]) -> None:
    if (role == "publisher") != bool(apps):
        raise click.UsageError("a publisher has --app, and nobody else")


def _digest(token: str) -> _Entry:
    return {"token_sha256": hashlib.sha256(token.encode()).hexdigest()} if token else {}


def _tell(write: Write, token: str, done: str) -> None:
    if token and not write.validate_only:
        click.echo(token)
    else:
        write.tell(done)


def _put(write: Write, entry: _Entry, etag: str) -> None:
    role = admin_pb2.Role.Value(f"ROLE_{entry['role'].upper()}")
    message = admin_pb2.Operator(**{**entry, "role": role}, etag=etag)
    write.call(lambda stub: stub.PutOperator, admin_pb2.PutOperatorRequest(operator=message))


def _before(write: Write, file: Path | None, name: str) -> tuple[_Entry, str, _Entry]:
    """Return an operator, its etag, and what its file has. A registry shows no digest of a token, and keeps it."""
    if file:
        known = _read(file)
        index = _index(known, name)
        if index is None:
            raise CommandError(f"{file} has no operator {name!r}", NOT_FOUND)
        return known["operators"][index], "", known
    found = next((each for each in _all(write.servers) if each.name == name), None)
    if found is None:
        raise CommandError(f"there is no operator {name!r}", NOT_FOUND)
    return {"role": printing.ROLES[found.role - 1], "apps": list(found.apps)}, found.etag, {}


def _all(servers: Servers) -> list[admin_pb2.Operator]:
    found = pages(servers, lambda stub: stub.ListOperators, admin_pb2.ListOperatorsRequest())
    return [each for page in found for each in page.operators]


def _way(each: admin_pb2.Operator) -> str:
    if each.has_token:
        return "token"
    if each.certificate:
        return printing.text(each.certificate)
    kind, name = ("group", each.group) if each.group else ("subject", each.subject)
    return printing.text(f"{each.issuer} {kind} {name}")


def _read(path: Path) -> _Entry:
    try:
        found = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {"operators": []}
    except (OSError, orjson.JSONDecodeError) as error:
        raise StartError(f"can't read {path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.setdefault("operators", []), list):
        raise StartError(f"{path}: should be an object with a list of operators")
    return found


def _index(known: _Entry, name: str) -> Any:
    """Return where an operator is in a file, or None."""
    entries = known["operators"]
    return next((at for at, each in enumerate(entries) if isinstance(each, dict) and each.get("name") == name), None)


def _in_file(entry: _Entry) -> _Entry:
    return {name: value for name, value in entry.items() if value}


def _save(write: Write, file: Path, known: _Entry) -> None:
    """Write a file, if registries will take it. Raises StartError."""
    operators.parse_file(file, orjson.dumps(known))
    if not write.validate_only:
        contexts.write_private(file, known, keep_readers=True)
