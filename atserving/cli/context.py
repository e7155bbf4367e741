"""``atserving context``: named meshes, and which one commands mean."""

from __future__ import annotations

import click
import msgspec

from atserving.cli import contexts, tables
from atserving.cli.contexts import Context

_FILE = click.Path(dir_okay=False, resolve_path=True)
name_argument = click.argument("name")


@click.group(help="Name meshes, and choose the one that commands mean.")
def context() -> None:
    pass


@context.command("list", help="List the contexts; * marks the current one.")
def list_() -> None:
    known = contexts.load()
    rows = [
        ("*" if name == known.current_context else "", name, tables.printable(each.server), tables.printable(each.edge))
        for name, each in sorted(known.contexts.items())
    ]
    click.echo(tables.table(("", "NAME", "SERVER", "EDGE"), rows))


@context.command(help="Print the name of the current context.")
def show() -> None:
    click.echo(contexts.load().current_context)


@context.command(help="Let commands mean the context NAME from now on.")
@name_argument
def use(name: str) -> None:
    known = contexts.load()
    contexts.named(known, name)
    known.current_context = name
    contexts.save(known)
    click.echo(f"commands mean {name}")


@context.command("set", help="Write the context NAME, or some of its addresses. The first one becomes the current one.")
@name_argument
@click.option("--server", allow_from_autoenv=False, metavar="HOST:PORT[,...]", help="Its registries.")
@click.option("--edge", allow_from_autoenv=False, metavar="URL", help="One of its Envoys, for `atserving eval`.")
@click.option("--tls-cert", type=_FILE, allow_from_autoenv=False, metavar="FILE", help="Your certificate (PEM).")
@click.option("--tls-key", type=_FILE, allow_from_autoenv=False, metavar="FILE", help="Its key (PEM).")
@click.option("--tls-ca", type=_FILE, allow_from_autoenv=False, metavar="FILE", help="The authorities to trust (PEM).")
@click.option("--tls-domain", allow_from_autoenv=False, metavar="NAME", help="The domain of names in certificates.")
def set_(name: str, server: str | None, edge: str | None, **tls: str | None) -> None:
    contexts.check_name(name)
    known = contexts.load()
    before = known.contexts.get(name, Context())
    changed = {field: value for field, value in tls.items() if value is not None}
    known.contexts[name] = msgspec.structs.replace(
        before,
        server=before.server if server is None else server,
        edge=before.edge if edge is None else edge.rstrip("/"),
        # Another registry must not get it.
        token=before.token if server in (None, before.server) else "",
        token_command=before.token_command if server in (None, before.server) else (),
        **changed,
    )
    known.current_context = known.current_context or name
    contexts.save(known)
    click.echo(f"{name} is set")


@context.command(help="Forget the context NAME.")
@name_argument
def delete(name: str) -> None:
    known = contexts.load()
    contexts.named(known, name)
    del known.contexts[name]
    if known.current_context == name:
        known.current_context = ""
    contexts.save(known)
    click.echo(f"{name} is forgotten")
