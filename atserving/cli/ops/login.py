"""``atserving login``: keep an operator's token, or a command that prints one, with a context."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli import contexts, tables
from atserving.cli.ops import printing
from atserving.cli.ops.client import Servers
from atserving.cli.ops.options import flag
from atserving.errors import StartError


@click.command(help="Keep a token with the current context, or with --context. It is asked for, or read from a pipe.")
@flag("--token-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Read the token from FILE.")
@flag(
    "--token-command",
    metavar="COMMAND",
    help="Keep COMMAND, which each command runs to print a token, in place of a token: for those that expire soon.",
)
@contexts.option
def login(token_file: Path | None, token_command: str | None) -> None:
    if token_file and token_command:
        raise click.UsageError("--token-file and --token-command exclude each other")
    known = contexts.load()
    name = contexts.chosen_name(known)
    if not name:
        raise StartError("there is no context: atserving context set NAME --server HOST:PORT")
    context = contexts.named(known, name)
    if not context.server:
        raise StartError(f"the context {name} has no server")
    context.token_command = _words(token_command) if token_command else ()
    if token_command:
        context.token, token = "", contexts.run(context.token_command)
    else:
        context.token = token = _token(token_file)
    if not token:
        raise StartError("there is no token")
    who = Servers(context.server.split(","), token=token).read(lambda stub: stub.GetSelf, admin_pb2.GetSelfRequest())
    if not who.name:
        raise StartError(f"the registry of {name} asks nobody who they are: the token is not kept")
    contexts.save(known)
    click.echo(f"you are {tables.printable(who.name)} ({printing.role(who)}) in {name}")


def _words(command: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise click.UsageError(f"--token-command: {error}") from None


def _token(file: Path | None) -> str:
    if file:
        try:
            return file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"can't read {file}: {error}") from None
    text: str = click.prompt("Token", hide_input=True) if sys.stdin.isatty() else sys.stdin.read()
    return text.strip()


@click.command(help="Forget the token of the current context, or of --context, or the command that prints it.")
@contexts.option
def logout() -> None:
    known = contexts.load()
    name = contexts.chosen_name(known)
    if name:
        context = contexts.named(known, name)
        context.token, context.token_command = "", ()
        contexts.save(known)
    click.echo(f"{name or 'no context'} has no token")
