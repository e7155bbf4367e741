"""``python -m registry``: read the flags, serve until a signal."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import click
import structlog

from atserving import lifecycle, telemetry, transport
from atserving.cli import service
from atserving.config import parse_duration
from atserving.errors import StartError
from atserving.v1 import registry_pb2, registry_pb2_grpc
from registry.etcd import Connection, EtcdClient, Tls, User
from registry.instances import Instances
from registry.mirror import Mirror
from registry.releases import Releases
from registry.server import RegistryServicer, ReleaseServicer
from registry.view import View

log = structlog.get_logger()

_GRACE_S = 5.0


@dataclass(frozen=True)
class RegistrySettings:
    """The settings of a registry, as its flags give them."""

    etcd: list[str]
    listen: str
    listen_releases: str | None
    tls: Tls | None
    user: User | None = field(repr=False)
    lease_ttl_s: int
    hold_s: float


class _LeaseTtl(click.ParamType[int]):
    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return whole seconds, the unit of etcd's leases. Accepts ``10`` and ``10s``."""
        text = str(value)
        try:
            ttl = parse_duration(f"{text}s" if text.isdecimal() else text)
        except ValueError as error:
            self.fail(f"{text!r} {error}", param, ctx)
        assert isinstance(ttl, timedelta)
        seconds = ttl.total_seconds()
        if seconds < 1 or seconds != int(seconds):
            self.fail(f"{text!r} should be whole seconds, at least 1", param, ctx)
        return int(seconds)


async def serve(settings: RegistrySettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartError."""
    stop = lifecycle.stop_signal()
    services = registry_pb2.DESCRIPTOR.services_by_name
    two_ports = bool(settings.listen_releases)
    server = transport.Server([services["RegistryService"]] if two_ports else services.values())
    release_server = transport.Server([services["ReleaseService"]]) if two_ports else server
    servers = [server, release_server] if two_ports else [server]
    connection = Connection(settings.etcd, tls=settings.tls, user=settings.user)
    async with EtcdClient(connection) as client:
        view = View(hold_s=settings.hold_s)
        mirror = Mirror(client, view)
        registry = RegistryServicer(mirror, Instances(client, settings.lease_ttl_s))
        releases = ReleaseServicer(mirror, Releases(client))
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server.grpc)
        registry_pb2_grpc.add_ReleaseServiceServicer_to_server(releases, release_server.grpc)
        ports = await _start(servers, settings)
        log.info("service starting", listen=settings.listen, port=ports[0], releases_port=ports[-1], etcd=settings.etcd)
        mirroring = asyncio.create_task(mirror.run())
        try:
            if await lifecycle.unless_stopped(view.synced.wait(), stop, mirroring):
                await _set_serving(servers, True)
                log.info("service ready", port=ports[0], releases_port=ports[-1])
                await lifecycle.until_stopped(stop, mirroring)
        finally:
            await _drain(servers, view)
            await lifecycle.end([mirroring])
    log.info("service stopped")


async def _start(servers: list[transport.Server], settings: RegistrySettings) -> list[int]:
    """Start the servers and return their ports. Raises StartError."""
    listens = [settings.listen, settings.listen_releases or ""]
    try:
        return [await each.start(listen) for each, listen in zip(servers, listens, strict=False)]
    except StartError:
        await asyncio.gather(*(each.stop(0) for each in servers))
        raise


async def _set_serving(servers: list[transport.Server], serving: bool) -> None:
    for each in servers:
        await each.set_serving(serving)


async def _drain(servers: list[transport.Server], view: View) -> None:
    """Send the followers to another registry, and let the calls in flight finish."""
    log.info("service draining", in_flight=len(view.subscriptions))
    await _set_serving(servers, False)
    view.close()
    await asyncio.gather(*(each.stop(_GRACE_S) for each in servers))


def _tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    if ca is None and cert is None and key is None:
        return None
    if (cert is None) != (key is None):
        raise click.UsageError("--etcd-cert and --etcd-key must be given together")
    try:
        # Check the files here: gRPC reads them only when it connects, and its error does not name the file.
        check = ssl.create_default_context(cafile=ca)
        if cert and key:
            check.load_cert_chain(cert, key)
        return Tls(*(path.read_bytes() if path else None for path in (ca, cert, key)))
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"can't load {', '.join(str(path) for path in (ca, cert, key) if path)}: {error}") from None


def _user(name: str | None, password: str | None) -> User | None:
    if (name is None) != (password is None):
        raise click.UsageError("--etcd-user and --etcd-password must be given together")
    return User(name, password) if name is not None and password is not None else None


_file = click.Path(path_type=Path)


@click.command(context_settings={"max_content_width": 100})
@service.addresses_option("--etcd", required=True, help="The members of one etcd cluster.")
@service.listen_option("0.0.0.0:50053")
@click.option(
    "--listen-releases",
    metavar="HOST:PORT",
    help="Address of the ReleaseService, the API for publishing; default: the address of --listen.",
)
@click.option("--etcd-ca", type=_file, metavar="FILE", help="CA certificates to trust for etcd (PEM); enables TLS.")
@click.option("--etcd-cert", type=_file, metavar="FILE", help="Client certificate for etcd (PEM); enables TLS.")
@click.option("--etcd-key", type=_file, metavar="FILE", help="Key of the client certificate (PEM).")
@click.option("--etcd-user", metavar="NAME", help="User name for etcd.")
@click.option("--etcd-password", metavar="TEXT", show_envvar=True, help="Password for etcd; prefer the variable.")
@click.option(
    "--lease-ttl",
    type=_LeaseTtl(),
    default="10s",
    show_default=True,
    metavar="DURATION",
    help="Time after which an instance without heartbeats is deregistered: seconds, or a duration such as 1m.",
)
@service.hold_option
@service.log_level_option
def main(
    etcd: list[str],
    listen: str,
    listen_releases: str | None,
    etcd_ca: Path | None,
    etcd_cert: Path | None,
    etcd_key: Path | None,
    etcd_user: str | None,
    etcd_password: str | None,
    lease_ttl: int,
    hold_deletions: float,
    log_level: str,
) -> None:
    """Mirror the release config and the instances from etcd, serve them, and publish releases.

    You can run any number of registries side by side. A registry starts without etcd and becomes ready after its first
    snapshot. During an outage of etcd it serves the last known config.
    """
    settings = RegistrySettings(
        etcd=etcd,
        listen=listen,
        listen_releases=listen_releases,
        tls=_tls(etcd_ca, etcd_cert, etcd_key),
        user=_user(etcd_user, etcd_password),
        lease_ttl_s=lease_ttl,
        hold_s=hold_deletions,
    )
    telemetry.configure_logging("registry", log_level)
    lifecycle.run(serve(settings))


if __name__ == "__main__":
    service.run(main, "registry")
