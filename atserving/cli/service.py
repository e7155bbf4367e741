"""Start the programs of the mesh: flags or variables, one line for an error, and an exit status."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click

from atserving.errors import StartError
from atserving.telemetry import SLOW_S
from atserving.tls import DEFAULT_DOMAIN, TlsFiles

log_level_option = click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="The least severe level to log.",
)


def finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Check that an option is a number, for its callback."""
    # Click takes nan for a number of any range.
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number", context, parameter)
    return value


log_requests_option = click.option(
    "--log-requests",
    type=click.FloatRange(0, 1),
    callback=finite,
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="The share of the successful requests that get a log line, 0 to 1; failed and slow ones always do.",
)


def _split_addresses(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    addresses = [address.strip() for address in value.split(",") if address.strip()]
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 65536):
            raise click.BadParameter(f"{address!r} is not host:port", context, parameter)
    if not addresses:
        raise click.BadParameter("no address given", context, parameter)
    return addresses


def addresses_option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """Return an option that takes ``host:port[,host:port...]`` and passes a list."""
    return click.option(*names, callback=_split_addresses, metavar="HOST:PORT[,...]", **attributes)


def listen_option(default: str) -> Callable[[Any], Any]:
    """Return ``--listen``, the address of the process's gRPC server."""
    return click.option(
        "--listen",
        default=default,
        show_default=True,
        metavar="HOST:PORT",
        help="The address of the gRPC server; port 0: any free port.",
    )


insecure_option = click.option(
    "--insecure",
    is_flag=True,
    help="Listen in plain text on addresses that are not loopback, too: whoever reaches them is trusted.",
)


def host_and_port(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check that an option is ``host:port``, for its callback."""
    if value is not None:
        host, _, port = value.rpartition(":")
        if not host or "/" in host or not port.isdigit():
            raise click.BadParameter(f"{value!r} is not host:port", context, parameter)
    return value


def http_option(pages: str) -> Callable[[Any], Any]:
    """Return ``--http``, the address of the process's pages for operators."""
    return click.option(
        "--http",
        default="127.0.0.1:0",
        show_default=True,
        callback=host_and_port,
        metavar="HOST:PORT",
        help=f"The address for {pages}; port 0: any free port.",
    )


def seconds_option(name: str, default: float, text: str) -> Callable[[Any], Any]:
    """Return an option that takes a number of seconds, 0 or more."""
    return click.option(
        name, type=click.FloatRange(0), default=default, show_default=True, metavar="SECONDS", help=text
    )


slow_option = click.option(
    "--slow",
    type=click.FloatRange(0),
    callback=finite,
    default=SLOW_S,
    show_default=True,
    metavar="SECONDS",
    help="A request that takes so long is slow, and always logged.",
)


def wait_option(text: str) -> Callable[[Any], Any]:
    """Return ``--wait``, how long a start may wait for other processes."""
    return seconds_option("--wait", 10.0, f"{text} 0: without a limit.")


hold_option = seconds_option(
    "--hold-deletions",
    600.0,
    "Seconds to hold back the deletion of most releases at once, which an emptied etcd looks like. 0: take it at once.",
)


trusted_keys_option = click.option(
    "--trusted-keys",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The public keys of who may sign releases; releases without a signature of theirs are refused.",
)


cache_option = click.option(
    "--config-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A file that keeps the last config, for a start while no registry answers.",
)


def tls_files(cert: Path | None, key: Path | None, ca: Path | None, domain: str) -> TlsFiles | None:
    """Return the files of TLS, or None without any. Raises UsageError if some are missing."""
    if cert is None and key is None and ca is None:
        return None
    if cert is None or key is None or ca is None:
        raise click.UsageError("--tls-cert, --tls-key and --tls-ca must be given together")
    return TlsFiles(cert, key, ca, domain)


def tls_options(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the flags of TLS, as its argument ``tls``."""

    @wraps(function)
    def command(
        tls_cert: Path | None, tls_key: Path | None, tls_ca: Path | None, tls_domain: str, **others: Any
    ) -> None:
        function(tls=tls_files(tls_cert, tls_key, tls_ca, tls_domain), **others)

    for option in (
        click.option(
            "--tls-domain",
            default=DEFAULT_DOMAIN,
            show_default=True,
            metavar="NAME",
            help="The domain of the names in certificates, spiffe://NAME/...",
        ),
        click.option("--tls-ca", type=_pem, metavar="FILE", help="The authorities that sign the peers (PEM)."),
        click.option("--tls-key", type=_pem, metavar="FILE", help="The key of --tls-cert (PEM)."),
        click.option(
            "--tls-cert",
            type=_pem,
            metavar="FILE",
            help="The certificate of this process (PEM): with it, every port is TLS, and peers show theirs.",
        ),
    ):
        command = option(command)
    return command


_pem = click.Path(path_type=Path, dir_okay=False)


def name_variables(command: click.Command, prefix: str = "ATSERVING") -> None:
    """Let every flag of a command and of its subcommands be a variable too, ``ATSERVING_<FLAG>``.

    A variable may also name the subcommand, such as ``ATSERVING_RELEASE_LIST_REGISTRY``, and takes precedence.
    """
    for option in command.params:
        if isinstance(option, click.Option) and option.allow_from_autoenv:
            flags = [flag.lstrip("-") for flag in option.opts if flag.startswith("--")]
            names = [f"{prefix}_{name}" for name in (option.name, *flags)] + [f"ATSERVING_{flag}" for flag in flags]
            option.envvar = list(dict.fromkeys(name.upper().replace("-", "_") for name in names))
    if isinstance(command, click.Group):
        for name, subcommand in command.commands.items():
            name_variables(subcommand, f"{prefix}_{name}")


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command as a program. Every flag may also be the variable ``ATSERVING_<FLAG>``.

    The process, and those it starts, leave no core files. An error is one line on standard error. The exit status is 2
    for a wrong flag, 1 or the error's for a failed start.
    """
    name_variables(command)
    # A core file would have every secret that the process knows.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(error.exit_code)
    except click.ClickException as error:
        print(f"{name}: {error.format_message()} (see {name} --help)", file=sys.stderr)
        sys.exit(error.exit_code)
    except StartError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    sys.exit(0)
