"""``atserving login``: keep an operator's token with a context. ``atserving operator``: hand out tokens."""

from __future__ import annotations

import hashlib
import secrets
import sys
from pathlib import Path
from typing import Any

import click
import orjson

from atserving.admin.v1 import admin_pb2
from atserving.cli import contexts
from atserving.cli.ops.client import Servers
from atserving.errors import StartError

_ROLES = ("viewer", "publisher", "admin")


@click.command(help="Keep a token with the current context, or with --context. It is asked for, or read from a pipe.")
@contexts.option
def login() -> None:
    known = contexts.load()
    name = contexts.chosen_name(known)
    if not name:
        raise StartError("there is no context: atserving context set NAME --server HOST:PORT")
    context = contexts.named(known, name)
    if not context.server:
        raise StartError(f"the context {name} has no server")
    token = click.prompt("Token", hide_input=True) if sys.stdin.isatty() else sys.stdin.read()
    context.token = token.strip()
    status = Servers(context.server.split(","), token=context.token).read(
        lambda stub: stub.GetStatus, admin_pb2.GetStatusRequest()
    )
    if not status.operator:
        raise StartError(f"the registry of {name} asks nobody who they are: the token is not kept")
    contexts.save(known)
    click.echo(f"you are {status.operator} in {name}")


@click.command(help="Forget the token of the current context, or of --context.")
@contexts.option
def logout() -> None:
    known = contexts.load()
    name = contexts.chosen_name(known)
    if name:
        contexts.named(known, name).token = ""
        contexts.save(known)
    click.echo(f"{name or 'no context'} has no token")


@click.group(help="Say who may operate, in the file of a registry's --operators.")
def operator() -> None:
    pass


def _read(path: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {"operators": []}
    except (OSError, orjson.JSONDecodeError) as error:
        raise StartError(f"can't read {path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("operators"), list):
        raise StartError(f"{path}: should be an object with a list of operators")
    return found


_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@operator.command(help="Add NAME to FILE, or give NAME another token, and print the token: nobody can read it later.")
@_file
@click.argument("name")
@click.option("--role", type=click.Choice(_ROLES), default="viewer", show_default=True, allow_from_autoenv=False)
@click.option(
    "--app", "apps", multiple=True, allow_from_autoenv=False, metavar="APP|PREFIX*", help="Of a publisher; repeatable."
)
def add(file: Path, name: str, role: str, apps: tuple[str, ...]) -> None:
    if (role == "publisher") != bool(apps):
        raise click.UsageError("a publisher has --app, and nobody else")
    found = _read(file)
    token = secrets.token_urlsafe(32)
    entry = {"name": name, "token_sha256": hashlib.sha256(token.encode()).hexdigest(), "role": role}
    others = [each for each in found["operators"] if each.get("name") != name]
    found["operators"] = [*others, {**entry, **({"apps": list(apps)} if apps else {})}]
    contexts.write_private(file, found)
    click.echo(token)


@operator.command(help="Remove NAME from FILE.")
@_file
@click.argument("name")
def remove(file: Path, name: str) -> None:
    found = _read(file)
    left = [each for each in found["operators"] if each.get("name") != name]
    if len(left) == len(found["operators"]):
        raise StartError(f"{file} has no operator {name!r}")
    found["operators"] = left
    contexts.write_private(file, found)
    click.echo(f"{name} is removed")
