"""``atserving config``: the whole config as files, reviewed and applied."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import orjson

from atserving.admin.v1 import admin_pb2
from atserving.cli import contexts
from atserving.cli.ops import completion, printing
from atserving.cli.ops.client import INVALID, CommandError, Servers, pages
from atserving.cli.ops.config_files import Tree, read_files, to_fields, warnings
from atserving.cli.ops.options import Write, flag, server_option, writing
from atserving.cli.tables import styled
from atserving.config import PREFIX
from atserving.errors import StartError

_files = click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, exists=False)
)
_prune = flag(
    "--prune",
    is_flag=True,
    help="Delete what the files lack: of the apps in them, and with `defaults` in them, all other apps.",
)


@click.group(help="Keep the config in files: check, export, diff and apply them.")
def config() -> None:
    pass


@config.command(help="Check FILES, or all files of folders, without a registry.")
@_files
def check(files: tuple[Path, ...]) -> None:
    found = list(warnings(read_files(files)))
    for line in found:
        click.echo(printing.text(line), err=True)
    if any(line.startswith("malformed") for line in found):
        raise CommandError("the files are wrong", INVALID)
    click.echo("the files are right")


@config.command(help="Print the config of APP, or of everything, as YAML that apply takes.")
@completion.app(required=False)
@server_option
@contexts.option
def export(app: str | None, server: list[str]) -> None:
    servers = Servers(server)
    document: dict[str, Any] = {}
    if app is None:
        document["defaults"] = _fields(servers, "")
    names = [app] if app else list(_apps(servers))
    document["apps"] = {name: _fields(servers, name) for name in names}
    click.echo(printing.yaml(document), nl=False)


@config.command(help="Show what apply would change. The exit status is 1 if something would.")
@_files
@_prune
@flag("--force", is_flag=True, help="Show it even if callers would lose by it.")
@server_option
@contexts.option
def diff(files: tuple[Path, ...], prune: bool, force: bool, server: list[str]) -> None:
    try:
        plan = _plan(Servers(server), read_files(files), prune=prune, force=force)
    except StartError as error:
        # 1 says that there is a difference.
        raise CommandError(str(error), max(error.exit_status, 2)) from None
    for response in plan.values():
        _show(response)
    if any(response.changes for response in plan.values()):
        sys.exit(1)


@config.command(help="Make the config what FILES, or all files of folders, say. Shows what changes, and asks first.")
@_files
@_prune
@click.option("--yes", "-y", is_flag=True, allow_from_autoenv=False, help="Do not ask.")
@writing
def apply(write: Write, files: tuple[Path, ...], prune: bool, yes: bool) -> None:
    tree = read_files(files)
    plan = _plan(write.servers, tree, prune=prune, force=write.force)
    changed = {app: response for app, response in plan.items() if response.changes}
    for response in changed.values():
        _show(response)
    if not changed:
        click.echo("nothing changes")
        return
    if not write.validate_only and not yes and not click.confirm("Apply this?", err=True):
        raise click.Abort
    done: list[str] = []
    for app, response in changed.items():
        request = admin_pb2.ApplyConfigRequest(app=app, values=tree.apps.get(app, {}), prune=prune, etag=response.etag)
        try:
            write.call(lambda stub: stub.ApplyConfig, request)
        except CommandError as error:
            rest = [_name(each) for each in changed if each not in done]
            kept = f"applied: {', '.join(map(_name, done)) or 'nothing'}; not applied: {', '.join(rest)}"
            raise CommandError(f"{error} ({kept})", error.exit_status) from None
        done.append(app)
        write.tell(f"{_name(app)}: {len(response.changes)} keys are changed")


def _plan(servers: Servers, tree: Tree, *, prune: bool, force: bool) -> dict[str, admin_pb2.ApplyConfigResponse]:
    """Return what would change, by app: the defaults first. Raises CommandError."""
    wanted = dict(tree.apps)
    if prune and tree.covers_all:
        wanted |= {app: {} for app in _apps(servers) if app not in wanted}
    return {
        app: servers.read(
            lambda stub: stub.ApplyConfig,
            admin_pb2.ApplyConfigRequest(app=app, values=wanted[app], prune=prune, force=force, validate_only=True),
        )
        for app in sorted(wanted)
    }


def _apps(servers: Servers) -> Iterator[str]:
    for page in pages(servers, lambda stub: stub.ListApps, admin_pb2.ListAppsRequest()):
        yield from (each.name for each in page.apps)


def _fields(servers: Servers, app: str) -> dict[str, Any]:
    found = servers.read(lambda stub: stub.GetConfig, admin_pb2.GetConfigRequest(app=app))
    printing.warn(found)
    return to_fields(found.values, app)


def _name(app: str) -> str:
    return app or "the defaults"


def _show(response: admin_pb2.ApplyConfigResponse) -> None:
    """Print the changes as a diff of YAML."""
    for change in response.changes:
        before, after = (_yaml(change, name) for name in ("before", "after"))
        key = change.key.removeprefix(PREFIX)
        what = "~" if before and after else "+" if after else "-"
        click.echo(styled(f"{what} {printing.text(key)}", bold=True))
        for line in list(difflib.unified_diff(before, after, n=3, lineterm=""))[2:]:
            if not line.startswith("@@"):
                color = {"+": "green", "-": "red"}.get(line[0])
                click.echo(styled(f"    {printing.text(line)}", fg=color))
    printing.warn(response)


def _yaml(change: admin_pb2.KeyChange, name: str) -> list[str]:
    if not change.HasField(name):  # type: ignore[arg-type] # one of two fields
        return []
    try:
        fields = orjson.loads(getattr(change, name))
    except orjson.JSONDecodeError:
        return [getattr(change, name)]
    return printing.yaml(fields).splitlines()
