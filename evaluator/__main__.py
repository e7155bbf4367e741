"""`python -m evaluator`: one instance, serving one release."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import click
import uvloop

from atserving.cli import service
from atserving.config import is_name
from atserving.telemetry import configure_logging
from evaluator.addresses import Network
from evaluator.instance import Settings, run


def _name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not is_name(value):
        raise click.BadParameter(
            f"{value!r} should match [A-Za-z0-9][A-Za-z0-9._-]{{0,62}}", ctx=context, param=parameter
        )
    return value


def _host_and_port(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit():
            raise click.BadParameter(f"{value!r} is not host:port", ctx=context, param=parameter)
    return value


def _networks(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Network]:
    try:
        return [ipaddress.ip_network(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=context, param=parameter) from None


@click.command()
@click.option("--app", required=True, callback=_name, help="The app to serve.")
@click.option("--version", required=True, callback=_name, help="Its version.")
@service.addresses_option("--registry", required=True, help="The registries, any of which will do.")
@service.listen_option("0.0.0.0:0")
@click.option(
    "--advertise",
    callback=_host_and_port,
    metavar="HOST:PORT",
    help="Where gates reach this instance; port 0: the one listened on.",
)
@click.option("--workspace", type=click.Path(path_type=Path, file_okay=False), help="Where files are kept meanwhile.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds to wait for a registry and for the release to be published.",
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that what is held may take after SIGTERM.",
)
@click.option(
    "--allow-network",
    "allow_networks",
    multiple=True,
    callback=_networks,
    metavar="CIDR",
    help="A network that resources may come from though it is not public; repeatable.",
)
@service.log_level_option
def main(
    app: str,
    version: str,
    registry: list[str],
    listen: str,
    advertise: str | None,
    workspace: Path | None,
    wait_s: float,
    grace_s: float,
    allow_networks: list[Network],
    log_level: str,
) -> None:
    """Serves one version of one app, as one instance of the mesh."""
    configure_logging("evaluator", log_level)
    settings = Settings(app, version, registry, listen, advertise, workspace, wait_s, grace_s, allow_networks)
    uvloop.run(run(settings))


if __name__ == "__main__":
    service.run(main, "evaluator")
