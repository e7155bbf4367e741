"""Named meshes in a file of the user: where their registries and edges are, and which one commands mean."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from atserving.errors import StartError
from atserving.tls import DEFAULT_DOMAIN, TlsFiles

_META, _TLS_META = "atserving.context", "atserving.tls"
# Somebody may have to log in with a browser.
_COMMAND_S = 120.0
TLS_FIELDS = ("tls_cert", "tls_key", "tls_ca", "tls_domain")
"""The fields of a context for TLS, which are flags, too."""
_TLS_TEXTS = (
    "Your certificate, for TLS with the registry (PEM).",
    "Its key (PEM).",
    "The authorities that sign the registry's certificate (PEM).",
    "The domain of the names in certificates.",
)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Context(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One mesh. An empty address is not set."""

    server: str = ""
    """The registries: ``host:port[,host:port...]``."""
    edge: str = ""
    """The URL of an Envoy."""
    token: str = ""
    """The operator's token, for these registries."""
    token_command: tuple[str, ...] = ()
    """In place of a token: the program that prints one, and its arguments."""
    tls_cert: str = ""
    """The files for TLS with these registries: the operator's certificate, its key, the authorities, and the domain."""
    tls_key: str = ""
    tls_ca: str = ""
    tls_domain: str = ""


class UnknownContext(StartError):  # noqa: N818
    """A wrong flag."""

    exit_status = 2


class Contexts(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """The contexts of the file, and the name of the current one."""

    current_context: str = ""
    contexts: dict[str, Context] = {}


def path() -> Path:
    """Return the file: that of ATSERVING_CONFIG, or ``atserving/config.json`` in the user's folder of settings."""
    if named := os.environ.get("ATSERVING_CONFIG"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "atserving" / "config.json"


def load() -> Contexts:
    """Read the file; without one there are no contexts. Raises StartError."""
    file = path()
    try:
        return msgspec.json.decode(file.read_bytes(), type=Contexts)
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise StartError(f"can't read {file}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StartError(f"{file} is wrong: {error}") from None


def save(contexts: Contexts) -> None:
    """Write the file, which nobody else can read. Raises StartError."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StartError(f"can't write {file}: {error.strerror}") from None
    write_private(file, contexts)


def write_private(file: Path, value: object, *, keep_readers: bool = False) -> None:
    """Replace a file by a value as JSON, which nobody else can read. Raises StartError.

    With ``keep_readers`` the owner and the mode stay those that the file has: a service may read it as another user.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}.", delete=False) as new:
            new.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
            if keep_readers and file.exists():
                before = file.stat()
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(new.fileno(), before.st_uid, before.st_gid)
                os.fchmod(new.fileno(), stat.S_IMODE(before.st_mode))
        Path(new.name).replace(file)
    except OSError as error:
        raise StartError(f"can't write {file}: {error.strerror}") from None


def named(contexts: Contexts, name: str) -> Context:
    """Return a context. Raises UnknownContext."""
    if name not in contexts.contexts:
        known = ", ".join(sorted(contexts.contexts)) or "none"
        raise UnknownContext(f"there is no context {name!r} in {path()}; it has: {known}")
    return contexts.contexts[name]


def check_name(name: str) -> None:
    """Raise BadParameter if a context can't have this name."""
    if not _NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r} should match {_NAME.pattern}")


def chosen_name(contexts: Contexts) -> str:
    """Return the name of ``--context``, or else of the current one; empty without any."""
    running = click.get_current_context(silent=True)
    named_here = running.meta.get(_META) if running else None
    return named_here or contexts.current_context


def chosen() -> Context:
    """Return the context of ``--context``, or else the current one; an empty one without any. Raises StartError."""
    running = click.get_current_context(silent=True)
    try:
        contexts = load()
        name = chosen_name(contexts)
        return named(contexts, name) if name else Context()
    except StartError:
        # A shell that completes a word shows no errors.
        if running and running.resilient_parsing:
            return Context()
        raise


def token() -> str:
    """Return the token that a command shows: that of ATSERVING_TOKEN, or of the context, or of its token command.

    Registries that the context does not name get none of it. Raises StartError.
    """
    if given := os.environ.get("ATSERVING_TOKEN", ""):
        return given
    running = click.get_current_context(silent=True)
    by_context = running and running.get_parameter_source("server") is ParameterSource.DEFAULT
    if not running or not by_context:
        return ""
    context = chosen()
    # A shell that completes a word runs no program.
    return run(context.token_command) if context.token_command and not running.resilient_parsing else context.token


def run(command: Sequence[str]) -> str:
    """Return the token that a command prints. It may ask the user on the terminal. Raises StartError."""
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=_COMMAND_S)
    except (OSError, UnicodeDecodeError, subprocess.SubprocessError) as error:
        raise StartError(f"the command that prints the token has failed: {error}") from None
    if not (found := ended.stdout.strip()):
        raise StartError(f"the command that prints the token prints nothing: {command[0]}")
    return found


def _by_context(command: click.Context | None) -> bool:
    """Return whether a command asks the registries of its context."""
    return command is not None and command.get_parameter_source("server") in (None, ParameterSource.DEFAULT)


def tls() -> TlsFiles | None:
    """Return the files for TLS: those of the flags, or of the context whose registries are asked. Raises StartError."""
    running = click.get_current_context(silent=True)
    given: dict[str, str] = running.meta.get(_TLS_META, {}) if running else {}
    context = chosen() if _by_context(running) else Context()
    cert, key, ca, domain = (given.get(name) or getattr(context, name) for name in TLS_FIELDS)
    if not (cert or key or ca):
        return None
    if not (cert and key and ca):
        raise UnknownContext("--tls-cert, --tls-key and --tls-ca must be given together")
    return TlsFiles(Path(cert), Path(key), Path(ca), domain or DEFAULT_DOMAIN)


def _remember_tls(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    context.meta.setdefault(_TLS_META, {})[parameter.name] = value


def tls_options(function: _Function) -> _Function:
    """Let a command take the flags of TLS, for :func:`tls`."""
    for name, text in zip(TLS_FIELDS, _TLS_TEXTS, strict=True):
        option = click.option(
            f"--{name.replace('_', '-')}",
            expose_value=False,
            callback=_remember_tls,
            metavar="NAME" if name == "tls_domain" else "FILE",
            help=f"{text} Default: the context's.",
        )
        function = option(function)
    return function


class OfMesh(click.Option):
    """An option for an address of a mesh: one that ``--context`` names wins over the option's variable."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        is_named = ctx.get_parameter_source("context") is ParameterSource.COMMANDLINE
        return None if is_named else super().resolve_envvar_value(ctx)


def _remember(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None and not context.resilient_parsing:
        named(load(), value)
    context.meta[_META] = value


# Eager: the defaults of other options need it.
option = click.option(
    "--context",
    envvar="ATSERVING_CONTEXT",
    is_eager=True,
    expose_value=False,
    callback=_remember,
    allow_from_autoenv=False,
    metavar="NAME",
    help="The mesh, as `atserving context` names it. Default: the current one.",
)
