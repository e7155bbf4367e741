"""``python -m registry``: read the flags, serve until a signal."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import click
import structlog
from click.core import ParameterSource

from atserving import lifecycle, rpc, telemetry
from atserving.admin.v1 import admin_pb2
from atserving.cli import service
from atserving.errors import StartError
from atserving.field_types import parse_duration
from atserving.grpc_server import Server
from atserving.ops_http import OpsServer
from atserving.sockets import is_loopback
from atserving.tls import REGISTRY, TlsFiles
from atserving.tls import Tls as ServiceTls
from atserving.v1 import registry_pb2
from registry.admin.history import History, Recorder
from registry.admin.operators import OperatorStore
from registry.admin.service import AdminService
from registry.admin.signed import Signatures
from registry.admin.writes import Writer
from registry.audit import Audit
from registry.comparisons import Comparisons
from registry.etcd import Connection, EtcdClient, Tls, User
from registry.instances import Instances
from registry.metrics import Calls, Metrics
from registry.mirror import Mirror
from registry.operators import Operators
from registry.peers import Peers
from registry.server import RegistryServicer, translate
from registry.view import View

log = structlog.get_logger()

_GRACE_S = 5.0
_MOST_REQUEST_BYTES = 4 << 20
_OPERATORS_ADDRESS = "127.0.0.1:50054"


@dataclass(frozen=True)
class RegistrySettings:
    """The settings of a registry, as its flags give them."""

    etcd: list[str]
    listen: str
    insecure: bool
    listen_operators: str | None
    etcd_tls: Tls | None
    user: User | None = field(repr=False)
    lease_ttl_s: int
    hold_s: float
    history_entries: int
    history_s: float
    operators: Path | None = None
    trusted_keys: Path | None = None
    http: str = "127.0.0.1:0"
    tls: TlsFiles | None = None
    audit_log: Path | None = None


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
    following = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    operating = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
    known = Operators(settings.operators) if settings.operators else None
    settings = replace(settings, listen_operators=_operators_address(settings))
    two_ports = bool(settings.listen_operators)
    server = Server([following] if two_ports else [following, operating], _MOST_REQUEST_BYTES)
    operators = Server([operating], _MOST_REQUEST_BYTES) if two_ports else server
    servers = [server, operators] if two_ports else [server]
    signatures = Signatures(settings.trusted_keys)
    tls = ServiceTls(settings.tls, REGISTRY) if settings.tls else None
    peers = Peers(tls) if tls else None
    authorize = known.authorize if known else peers.operate if peers else None
    audit = Audit(settings.audit_log)
    if settings.audit_log:
        # Rotators send it once they have moved the file, which is noticed anyway.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    client = EtcdClient(Connection(settings.etcd, tls=settings.etcd_tls, user=settings.user))
    view = View(hold_s=settings.hold_s)
    mirror = Mirror(client, view, known.roster if known else None)
    recorder = Recorder(client, settings.history_entries, settings.history_s)
    instances = Instances(client, settings.lease_ttl_s, view)
    calls = Calls()
    metrics = Metrics(mirror, instances, recorder, client.counts, calls, operating.methods_by_name.keys(), tls)
    async with client, OpsServer(settings.http, {"/metrics": metrics.expose}, lambda: server.is_serving) as ops:
        comparisons = Comparisons()
        writer = Writer(client, mirror, recorder, signatures)
        store = OperatorStore(client, writer, known)
        admin = AdminService(mirror, writer, History(client), comparisons, store, tls)
        registry = RegistryServicer(mirror, instances, comparisons)
        rpc.serve(server, following, registry, translate, peers.follow if peers else None, calls.observe)
        rpc.serve(operators, operating, admin, translate, authorize, calls.observe, audit.ended)
        ports = await _start(servers, settings, tls)
        if not known:
            who = "an operator or an Envoy that" if tls else "whoever"
            where = settings.listen_operators or settings.listen
            log.warning("operators unknown", reason=f"{who} reaches {where} may publish, see --operators")
        log.info(
            "service starting", listen=settings.listen, port=ports[0], operators_port=ports[-1], etcd=settings.etcd
        )
        tasks = [asyncio.create_task(mirror.run()), asyncio.create_task(recorder.run())]
        if known:
            tasks.append(asyncio.create_task(known.run()))
        try:
            if await lifecycle.unless_stopped(view.synced.wait(), stop, *tasks):
                await _set_serving(servers, True)
                log.info("service ready", port=ports[0], operators_port=ports[-1], http_port=ops.port)
                await lifecycle.until_stopped(stop, *tasks)
        finally:
            await _drain(servers, view)
            await lifecycle.end(tasks)
            audit.turn()
    log.info("service stopped")


def _operators_address(settings: RegistrySettings) -> str | None:
    """Return the address of the API for operators; None: that of the rest. Raises StartError.

    Where nobody is asked who they are, only this machine reaches it, unless somebody wants more. With TLS it takes the
    certificates of operators and Envoys alone.
    """
    given = settings.listen_operators
    if settings.operators or settings.tls:
        return given
    if given and not (settings.insecure or is_loopback(given)):
        raise StartError(
            f"--listen-operators {given} would let whoever reaches it publish: name the operators by --operators, "
            "or pass --insecure"
        )
    return given or (None if is_loopback(settings.listen) else _OPERATORS_ADDRESS)


async def _start(servers: list[Server], settings: RegistrySettings, tls: ServiceTls | None) -> list[int]:
    """Start the servers and return their ports. Raises StartError."""
    listens = [settings.listen, settings.listen_operators or ""]
    try:
        return [
            await each.start(listen, insecure=settings.insecure, tls=tls)
            for each, listen in zip(servers, listens, strict=False)
        ]
    except StartError as error:
        await asyncio.gather(*(each.stop(0) for each in servers))
        hint = "; --listen-operators takes another address" if _OPERATORS_ADDRESS in str(error) else ""
        raise StartError(f"{error}{hint}") from None


async def _set_serving(servers: list[Server], serving: bool) -> None:
    for each in servers:
        await each.set_serving(serving)


async def _drain(servers: list[Server], view: View) -> None:
    """Send the followers to another registry, and let the calls in flight finish."""
    log.info("service draining", in_flight=len(view.subscriptions))
    await _set_serving(servers, False)
    view.close()
    await asyncio.gather(*(each.stop(_GRACE_S) for each in servers))


def _etcd_tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    if ca is None and cert is None and key is None:
        return None
    if (cert is None) != (key is None):
        raise click.UsageError("--etcd-cert and --etcd-key must be given together")
    return Tls(ca, cert, key)


def _user(name: str | None, password: str | None, file: Path | None) -> User | None:
    if password is not None and file is not None:
        raise click.UsageError("ATSERVING_ETCD_PASSWORD and --etcd-password-file exclude each other")
    if file:
        try:
            password = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is no text"
            raise StartError(f"--etcd-password-file {file}: {reason}") from None
    if (name is None) != (password is None):
        raise click.UsageError("--etcd-user and ATSERVING_ETCD_PASSWORD or --etcd-password-file go together")
    return User(name, password) if name is not None and password is not None else None


def _only_by_variable(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
        raise click.UsageError(
            "a password among the flags is visible to everybody on this machine: use the variable "
            "ATSERVING_ETCD_PASSWORD, or --etcd-password-file"
        )
    return value


_file = click.Path(path_type=Path)


@click.command(context_settings={"max_content_width": 100})
@service.addresses_option("--etcd", required=True, help="The members of one etcd cluster.")
@service.listen_option("127.0.0.1:50053")
@service.insecure_option
@click.option(
    "--listen-operators",
    metavar="HOST:PORT",
    help="Address of the API for operators and their tools. Default: that of --listen; 127.0.0.1:50054 if "
    "that is not loopback, and there is neither --operators nor TLS.",
)
@click.option("--etcd-ca", type=_file, metavar="FILE", help="CA certificates to trust for etcd (PEM); enables TLS.")
@click.option("--etcd-cert", type=_file, metavar="FILE", help="Client certificate for etcd (PEM); enables TLS.")
@click.option("--etcd-key", type=_file, metavar="FILE", help="Key of the client certificate (PEM).")
@click.option("--etcd-user", metavar="NAME", help="User name for etcd.")
@click.option(
    "--etcd-password",
    callback=_only_by_variable,
    metavar="TEXT",
    show_envvar=True,
    help="Password for etcd, by the variable alone: everybody on the machine sees flags.",
)
@click.option("--etcd-password-file", type=_file, metavar="FILE", help="A file with the password for etcd.")
@click.option(
    "--lease-ttl",
    type=_LeaseTtl(),
    default="30s",
    show_default=True,
    metavar="DURATION",
    help="Time after which an instance without heartbeats is deregistered: seconds, or a duration such as 1m.",
)
@click.option(
    "--history-entries",
    type=click.IntRange(1, 10_000),
    default=200,
    show_default=True,
    help="How many changes of an app the history keeps.",
)
@click.option(
    "--history-days",
    type=click.IntRange(1, 3650),
    default=365,
    show_default=True,
    help="How many days it keeps a change.",
)
@click.option(
    "--operators",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Who may operate, beside those in etcd, and the issuers of tokens; without it, everybody may.",
)
@click.option(
    "--audit-log",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A file that gets the lines of operators' calls which write or are refused, beside the log.",
)
@service.trusted_keys_option
@service.http_option("/metrics, /live, /ready and /log")
@service.tls_options
@service.hold_option
@service.log_level_option
def main(
    etcd: list[str],
    listen: str,
    insecure: bool,
    listen_operators: str | None,
    etcd_ca: Path | None,
    etcd_cert: Path | None,
    etcd_key: Path | None,
    etcd_user: str | None,
    etcd_password: str | None,
    etcd_password_file: Path | None,
    lease_ttl: int,
    history_entries: int,
    history_days: int,
    operators: Path | None,
    audit_log: Path | None,
    trusted_keys: Path | None,
    http: str,
    tls: TlsFiles | None,
    hold_deletions: float,
    log_level: str,
) -> None:
    """Mirror the release config and the instances from etcd, serve them, and change the config for operators.

    You can run any number of registries side by side. A registry starts without etcd and becomes ready after its first
    snapshot. During an outage of etcd it serves the last known config.
    """
    settings = RegistrySettings(
        etcd=etcd,
        listen=listen,
        insecure=insecure,
        listen_operators=listen_operators,
        etcd_tls=_etcd_tls(etcd_ca, etcd_cert, etcd_key),
        user=_user(etcd_user, etcd_password, etcd_password_file),
        lease_ttl_s=lease_ttl,
        hold_s=hold_deletions,
        history_entries=history_entries,
        history_s=history_days * 86400,
        operators=operators,
        trusted_keys=trusted_keys,
        http=http,
        tls=tls,
        audit_log=audit_log,
    )
    telemetry.configure_logging("registry", log_level, threaded=True)
    lifecycle.run(serve(settings))


if __name__ == "__main__":
    service.run(main, "registry")
