"""`python -m gate`: flags, settings, run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import structlog

from atserving import lifecycle, malloc, tracing
from atserving.cli import service
from atserving.counting import MAX_REQUEST_BYTES
from atserving.errors import StartError
from atserving.follower import ConfigFollower, reminding
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.ops_http import OpsServer
from atserving.telemetry import configure_logging
from atserving.tls import ENVOY, GATE, Tls, TlsFiles
from atserving.v1 import edge_pb2, serving_pb2
from gate.authorization import Authorization
from gate.caller_keys import CallerKeys
from gate.callers import BEARER, QINIU, Callers, read_keys
from gate.connection import EvaluatorConnection
from gate.dispatch import Dispatcher
from gate.metrics import Metrics
from gate.rate_limit_service import RateLimitService
from gate.reporting import report
from gate.request_counts import RequestCounts
from gate.request_metrics import RequestMetrics
from gate.router import Router
from gate.server import EdgeService, ServingService
from gate.shadow import Shadows
from gate.state_metrics import StateMetrics

log = structlog.get_logger()

_TEND_S = 1.0
# Each thread of an Envoy has one, and one more for 2048 requests in flight.
_MOST_CONNECTIONS = 2048


@dataclass(frozen=True)
class GateSettings:
    """The command line of a gate, parsed."""

    registries: list[str]
    listen: str
    insecure: bool
    http: str
    wait_s: float
    drain_s: float
    grace_s: float
    max_batch: int
    max_held_bytes: int
    hold_s: float
    cache: Path | None = None
    edge_key: Path | None = None
    caller_keys: Path | None = None
    tls: TlsFiles | None = None
    rate_limit_service: str | None = None
    rate_limit_timeout_s: float = 0.02


async def serve(settings: GateSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartError."""
    stop = lifecycle.stop_signal()
    tls = Tls(settings.tls, GATE) if settings.tls else None
    held = HeldBytes(settings.max_held_bytes)
    router = Router(partial(EvaluatorConnection, held=held, tls=tls))
    follower = ConfigFollower(settings.registries, router.apply, hold_s=settings.hold_s, cache=settings.cache, tls=tls)
    tracer = tracing.from_environment("atserving-gate")
    server = Server(
        [serving_pb2.DESCRIPTOR.services_by_name["ServingService"]],
        MAX_REQUEST_BYTES,
        held,
        internal=[edge_pb2.DESCRIPTOR.services_by_name["EdgeService"]],
        max_connections=_MOST_CONNECTIONS,
        peers=[tls.uri(ENVOY)] if tls else None,
    )
    shadows = Shadows(router, held)
    rate_limits: RateLimitService | None = None
    if settings.rate_limit_service:
        rate_limits = RateLimitService(settings.rate_limit_service, settings.rate_limit_timeout_s)
    dispatcher = Dispatcher(router, follower.synced, shadows, rate_limits, tracer)
    keys = CallerKeys(settings.caller_keys) if settings.caller_keys else None
    if keys and not (settings.edge_key or tls):
        raise StartError("--caller-keys needs --edge-key or TLS: else anybody could ask a gate who a caller is")
    schemes = (BEARER, QINIU) if keys else (BEARER,)
    callers = Callers(read_keys(settings.edge_key) if settings.edge_key else (), schemes, only_envoy=tls is not None)
    if keys:
        Authorization(keys, callers, dispatcher.counts).register(server)
    ServingService(dispatcher, settings.max_batch, held, callers).register(server)
    EdgeService(dispatcher, settings.max_batch, held, callers).register(server)
    following = asyncio.create_task(follower.run())
    tending = asyncio.create_task(_tend(router, dispatcher.counts))
    reporting = asyncio.create_task(report(settings.registries, shadows, tls))
    ready = False
    collectors = (RequestMetrics(dispatcher.counts, router), StateMetrics(server, follower, held, tracer))
    metrics = Metrics(shadows, dispatcher.turns, rate_limits, tls, collectors)
    ops = OpsServer(settings.http, {"/metrics": metrics.page}, lambda: server.is_serving)
    try:
        await ops.start()
        port = await server.start(settings.listen, insecure=settings.insecure, tls=tls)
        if not await lifecycle.unless_stopped(_wait_synced(follower, settings.wait_s), stop, following):
            return
        if rate_limits:
            await rate_limits.check()
        await server.set_serving(True)
        ready = True
        log.info("service ready", port=port, http_port=ops.port)
        await lifecycle.until_stopped(stop, following, tending, reporting)
        log.info("service draining")
        await server.set_serving(False)
        # Keep serving until the health checks of the edge have seen it, so that no request is refused.
        await asyncio.sleep(settings.drain_s)
    finally:
        await server.stop(settings.grace_s)
        await lifecycle.end([following, tending, reporting])
        await ops.stop()
        if rate_limits:
            await rate_limits.close()
        if tracer:
            await tracer.close()
        if ready:
            log.info("service stopped")


async def _wait_synced(follower: ConfigFollower, wait_s: float) -> bool:
    """Return True once the gate has a config. Raises StartError after ``wait_s`` seconds (0: never)."""
    try:
        async with reminding(lambda: follower.last_error), asyncio.timeout(wait_s or None):
            return await follower.synced.wait()
    except TimeoutError:
        raise StartError(f"no config within {wait_s:g} s: {follower.last_error}") from None


async def _tend(router: Router[EvaluatorConnection], counts: RequestCounts) -> None:
    """Close the connections that the router no longer uses, once a second, and drop the counts of what is gone."""
    while True:
        await asyncio.sleep(_TEND_S)
        counts.tidy()
        unused = [endpoint.take_connection() for endpoint in router.expired()]
        for connection in (*unused, *router.idle()):
            if connection:
                await connection.close()


@click.command(help="Routes eval requests, by gRPC and through the edge, to the evaluators that the registry lists.")
@service.addresses_option(
    "--registry", default="127.0.0.1:50053", show_default=True, help="The registries; the gate uses any one of them."
)
@service.listen_option("127.0.0.1:50051")
@service.insecure_option
@service.http_option("/metrics, /live, /ready and /log")
@service.wait_option("Seconds to wait for a registry at start.")
@service.seconds_option("--drain", 3.0, "Seconds to keep serving at stop, until the edge has seen it.")
@service.seconds_option("--grace", 30.0, "Seconds for requests in flight to finish after that.")
@click.option(
    "--max-batch", type=click.IntRange(1), default=1000, show_default=True, help="The most tasks in one batch."
)
@click.option(
    "--max-held",
    type=click.IntRange(64),
    default=256,
    show_default=True,
    metavar="MIB",
    help="The most MiB of requests and answers that the gate holds; it refuses what is over it.",
)
@click.option(
    "--edge-key",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The keys that Envoy shows, one in each line; without it and without TLS, gates know no caller.",
)
@click.option(
    "--caller-keys",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The keys of callers who sign requests as for Qiniu, if Envoy asks for them; needs --edge-key or TLS.",
)
@service.tls_options
@click.option(
    "--rate-limit-service",
    callback=service.host_and_port,
    metavar="HOST:PORT",
    help="A service of Envoy's rate limit protocol, which counts what callers ask over all gates.",
)
@click.option(
    "--rate-limit-timeout",
    type=click.FloatRange(0, min_open=True),
    default=0.02,
    show_default=True,
    metavar="SECONDS",
    help="Seconds that a request waits for it; after that the gate's own limits decide.",
)
@service.hold_option
@service.cache_option
@service.log_level_option
@service.log_requests_option
@service.slow_option
def main(
    registry: list[str],
    listen: str,
    insecure: bool,
    http: str,
    wait: float,
    drain: float,
    grace: float,
    max_batch: int,
    max_held: int,
    edge_key: Path | None,
    caller_keys: Path | None,
    tls: TlsFiles | None,
    rate_limit_service: str | None,
    rate_limit_timeout: float,
    hold_deletions: float,
    config_cache: Path | None,
    log_level: str,
    log_requests: float,
    slow: float,
) -> None:
    configure_logging("gate", log_level, requests=log_requests, slow_s=slow, threaded=True)
    malloc.keep_freed()
    settings = GateSettings(
        registries=registry,
        listen=listen,
        insecure=insecure,
        http=http,
        wait_s=wait,
        drain_s=drain,
        grace_s=grace,
        max_batch=max_batch,
        max_held_bytes=max_held << 20,
        hold_s=hold_deletions,
        cache=config_cache,
        edge_key=edge_key,
        caller_keys=caller_keys,
        tls=tls,
        rate_limit_service=rate_limit_service,
        rate_limit_timeout_s=rate_limit_timeout,
    )
    lifecycle.run(serve(settings))


if __name__ == "__main__":
    service.run(main, "gate")
