"""The flags that the commands of operators share."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import click
from google.protobuf.message import Message

from atserving.cli import contexts, service
from atserving.cli.ops import printing
from atserving.cli.ops.client import Method, Request, Response, Servers

DEFAULT_SERVER = "127.0.0.1:50053"
_FORMATS = ("table", "wide", "json", "yaml")

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Write:
    """How a command writes."""

    servers: Servers
    validate_only: bool
    force: bool
    message: str
    actor: str

    def call(self, method: Method[Request, Response], request: Request) -> Response:
        """Send a request for a change, with the flags; print the warnings of the answer. Raises CommandError."""
        for name in ("validate_only", "force", "message", "actor"):
            if name in request.DESCRIPTOR.fields_by_name:
                setattr(request, name, getattr(self, name))
        answer = self.servers.write(method, request)
        printing.warn(answer)
        return answer

    def tell(self, done: str) -> None:
        """Print what is done, or that it would be."""
        click.echo(f"{done} (dry run: nothing is changed)" if self.validate_only else done)


@dataclass(frozen=True)
class Read:
    """How a command reads."""

    servers: Servers
    format: str = "table"

    @property
    def is_for_programs(self) -> bool:
        """Whether to print what the API answers, and no table."""
        return self.format in ("json", "yaml")

    @property
    def is_wide(self) -> bool:
        """Whether a table has all columns."""
        return self.format == "wide"

    def print(self, found: Message | Mapping[str, Any]) -> None:
        """Print a message, or a value of JSON, for programs."""
        printing.document(found, self.format)


def flag(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return an option that no variable sets: ``ATSERVING_WAIT``, for one, belongs to the services."""
    return click.option(*names, allow_from_autoenv=False, **attributes)


_server_option = service.addresses_option(
    "--server",
    "--registry",
    "server",
    cls=contexts.OfMesh,
    default=lambda: contexts.chosen().server or DEFAULT_SERVER,
    show_default=f"the context's, or {DEFAULT_SERVER}",
    help="The registries; the first that answers is used.",
)


def server_option(function: _Function) -> _Function:
    """Let a command take the registries, and the files for TLS with them."""
    return cast(_Function, contexts.tls_options(_server_option(function)))


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container's user may have no name.
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def writing(function: _Function) -> Callable[..., Any]:
    """Let a command take the flags of a write, as its argument ``write``."""

    @wraps(function)
    def command(server: list[str], dry_run: bool, force: bool, message: str, actor: str, **others: Any) -> Any:
        return function(write=Write(Servers(server), dry_run, force, message, actor), **others)

    for option in (
        click.option("--actor", default=_actor, show_default="user@host", help="Who, for the history."),
        flag("-m", "--message", default="", metavar="TEXT", help="Why, for the history."),
        flag("--force", is_flag=True, help="Do it even if callers lose by it."),
        flag("--dry-run", is_flag=True, help="Check it, and change nothing."),
        server_option,
        contexts.option,
    ):
        command = option(command)
    return command


def reading(function: _Function) -> Callable[..., Any]:
    """Let a command take the flags of a read, as its argument ``read``."""

    @wraps(function)
    def command(server: list[str], format: str, **others: Any) -> Any:
        return function(read=Read(Servers(server), format), **others)

    for option in (
        flag("-o", "--format", type=click.Choice(_FORMATS), default=_FORMATS[0], help=f"Default: {_FORMATS[0]}."),
        server_option,
        contexts.option,
    ):
        command = option(command)
    return command
