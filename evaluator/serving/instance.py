"""The life of one instance: listen, load, warm up, register; serve; deregister, drain, stop."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import orjson
import structlog

from atserving import lifecycle, malloc, telemetry, tracing
from atserving.config import Instance, MalformedConfig, WorkerConfig, validate
from atserving.errors import StartError
from atserving.grpc_server import Server
from atserving.held import HeldBytes
from atserving.hosts import Hosts
from atserving.ops_http import OpsServer, Page
from atserving.tls import EVALUATOR, GATE, REGISTRY, Tls, TlsFiles
from atserving.tracing import Tracer
from atserving.v1 import evaluator_pb2
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.host_rules import HostRules
from evaluator.fetching.proxy import Proxy
from evaluator.fetching.release import check_signature, fetch_release, with_local_files
from evaluator.fetching.resources import ResourceFetcher
from evaluator.net_config import NetConfig
from evaluator.sandbox.decision import Sandbox, SandboxSettings
from evaluator.serving.advertised import advertised_address
from evaluator.serving.capacity import Capacity
from evaluator.serving.gpu_state import GpuReader
from evaluator.serving.link_server import LinkServer
from evaluator.serving.listener import Listener
from evaluator.serving.metrics import Metrics
from evaluator.serving.pipeline import Pipeline
from evaluator.serving.registration import Registration
from evaluator.serving.release_config import VersionConfigFollower
from evaluator.serving.server import EvaluatorService
from evaluator.serving.spans import Spans
from evaluator.serving.status import State, Status
from evaluator.serving.supervisor import WorkerSupervisor
from evaluator.serving.workspace import workspace

if TYPE_CHECKING:
    from atserving.signatures import TrustedKeys
    from evaluator.fetching.qiniu import QiniuConfig

log = structlog.get_logger()

# Gates learn within this time that an instance has deregistered; until then it answers, if only to refuse.
_LINGER_S = 0.5
# The part of the grace in which the server sends its last replies before it cuts connections.
_STOP_S = 1.0
# What the front takes beside the bytes that it holds, with the libraries of both processes.
_FRONT_BYTES = 128 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class InstanceSettings:
    """The command line of an instance, parsed."""

    app: str
    version: str
    registries: Sequence[str]
    listen: str
    advertise: str | None = None
    insecure: bool = False
    workspace: Path | None = None
    wait_s: float = 10.0
    grace_s: float = 30.0
    allow_networks: Sequence[AllowedNetwork] = ()
    qiniu: QiniuConfig | None = None
    http: str = "127.0.0.1:0"
    status_file: Path | None = None
    config_cache: Path | None = None
    max_held_bytes: int = 256 << 20
    trusted_keys: TrustedKeys | None = None
    proxy: Proxy | None = None
    tls: TlsFiles | None = None
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    local_files: Sequence[Path] = ()
    """The folders that ``file://`` of a release may name; none: all."""
    own_files: Sequence[Path] = ()
    """Files of the evaluator itself, which no release may name."""


async def run(settings: InstanceSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartError, which the status reports too."""
    status = Status(settings.app, settings.version, settings.status_file)
    status.set(State.LOADING)
    try:
        await _Life(settings, status).run()
    except StartError as error:
        status.set(State.FAILED, str(error))
        raise
    except BaseException:
        status.set(State.FAILED, "it failed unexpectedly, see the log")
        raise
    status.set(State.STOPPED)


class _Life:
    """The parts of an instance, and the order in which they start and stop."""

    def __init__(self, settings: InstanceSettings, status: Status) -> None:
        self._settings = settings
        self._status = status
        self._log = log.bind(app=settings.app, version=settings.version)
        self._capacity = Capacity(1)
        self._tls = tls = Tls(settings.tls, f"{EVALUATOR}/{settings.app}") if settings.tls else None
        self._id = secrets.token_hex(8)
        self._tracer = tracing.from_environment("atserving-evaluator", {"service.instance.id": self._id})
        self._metrics = Metrics(settings.app, settings.version, tls, self._tracer)
        self._follower = VersionConfigFollower(
            settings.registries, settings.app, settings.version, settings.config_cache, tls
        )
        self._held = HeldBytes(settings.max_held_bytes)
        self._links = LinkServer(self._held)
        self._server = Server(
            [evaluator_pb2.DESCRIPTOR.services_by_name["EvaluatorService"]],
            held=self._held,
            peers=[tls.uri(GATE), tls.uri(REGISTRY)] if tls else None,
        )
        self._service = EvaluatorService()
        self._service.register(self._server)
        self._stop = lifecycle.stop_signal()
        self._digest = self._files = ""
        self._worker_changed = asyncio.Event()

    async def run(self) -> None:
        settings = self._settings
        self._log.debug("service starting", registries=settings.registries)
        pages: dict[str, Page] = {"/metrics": self._metrics.page, "/status": self._status.page}
        with workspace(settings.workspace, f"{settings.app}-{settings.version}") as folder:
            async with (
                _exported(self._tracer),
                OpsServer(settings.http, pages, lambda: self._server.is_serving) as ops,
                _background(self._follower.run()) as following,
                AsyncExitStack() as stack,
            ):
                # The health service answers from the start, so that a probe sees a live process during a long load.
                port = await self._listen(stack)
                loaded = await lifecycle.unless_stopped(self._load(folder, stack, ops.port), self._stop, following)
                if loaded:
                    await self._serve(*loaded, port, following)

    async def _listen(self, stack: AsyncExitStack) -> int:
        """Listen for gates and for gRPC on one port, and return it. Raises StartError."""
        stack.push_async_callback(self._server.stop, 0)
        self._listener = Listener(self._links.connect, self._server.connect, self._tls)
        stack.callback(self._links.abort)
        stack.callback(self._listener.close)
        return await self._listener.start(self._settings.listen, insecure=self._settings.insecure)

    async def _load(self, folder: Path, stack: AsyncExitStack, http_port: int) -> tuple[NetConfig, WorkerSupervisor]:
        self._follower.on_outdated = self._mark_outdated
        release = await self._follower.release(self._settings.wait_s)
        self._digest = release.digest
        signed_by = check_signature(release, self._settings.trusted_keys)
        self._log.info("release loading", http_port=http_port, **({"signed_by": signed_by} if signed_by else {}))
        release = with_local_files(release, self._settings.local_files, self._settings.own_files)
        digests: dict[str, str] = {}
        config = await fetch_release(
            release, folder, self._settings.qiniu, digests, self._settings.proxy, copied=bool(signed_by)
        )
        self._files = hashlib.sha256(orjson.dumps(digests, option=orjson.OPT_SORT_KEYS)).hexdigest()
        # Refuse wrong limits before the worker loads the net, which may take long.
        _check_held(config, self._settings.max_held_bytes)
        self._check_scripts(config)
        worker = WorkerSupervisor(
            config,
            self._settings.max_held_bytes + _FRONT_BYTES,
            self._settings.sandbox,
            timed=self._tracer is not None,
        )
        self._status.sandbox = worker.sandbox
        _log_sandbox(self._log, worker.sandbox)
        stack.push_async_callback(worker.close)
        telemetry.follow(lambda _: worker.tell_settings())
        await worker.start()
        self._status.device, self._status.plan = config.use_device, worker.plan
        self._log.info("net loaded", device=config.use_device, **asdict(worker.plan))
        return config, worker

    async def _serve(
        self, config: NetConfig, worker: WorkerSupervisor, port: int, following: asyncio.Task[None]
    ) -> None:
        settings, capacity, metrics = self._settings, self._capacity, self._metrics
        malloc.keep_freed()
        metrics.of_worker(worker)
        if config.use_device != "CPU" and worker.gpu:
            metrics.of_gpu(GpuReader(worker.gpu))
        worker.on_away = self._links.set_away
        metrics.of_capacity(capacity, self._held, lambda: len(self._links.links))
        policy = AddressPolicy(settings.allow_networks)
        names = {"app": settings.app, "version": settings.version, "instance": self._id}
        spans = Spans(self._tracer, worker, **names) if self._tracer else None
        async with (
            ResourceFetcher(config.limits.max_bytes, policy, settings.qiniu, proxy=settings.proxy) as fetcher,
            _background(worker.run()) as working,
        ):
            pipeline = Pipeline(
                settings.app,
                settings.version,
                config,
                worker=worker,
                fetcher=fetcher,
                capacity=capacity,
                metrics=metrics,
                held=self._held,
                spans=spans,
            )
            instance = await asyncio.to_thread(_instance, settings, self._id, port, self._loaded(config, worker))
            self._service.serve(instance.id, pipeline, lambda: worker.is_away)
            self._links.serve(instance, pipeline, built_in=not config.script)
            registration = Registration(
                settings.registries, lambda: msgspec.structs.replace(instance, capacity=capacity.limit), self._tls
            )

            def apply(worker_config: WorkerConfig) -> None:
                assert worker_config.max_concurrent is not None
                assert worker_config.delay4batch is not None
                self._worker_changed.set()
                capacity.limit = worker_config.max_concurrent
                assert worker_config.timeout is not None
                worker.configure(
                    delay_s=worker_config.delay4batch.total_seconds(),
                    most=worker_config.max_concurrent,
                    timeout_s=worker_config.timeout.total_seconds(),
                )
                assert worker_config.fetch_allow is not None
                assert worker_config.fetch_deny is not None
                fetcher.restrict(HostRules(Hosts(worker_config.fetch_allow), Hosts(worker_config.fetch_deny)))
                registration.renew()

            self._follower.on_worker = apply
            # Not only with the next heartbeat: callers may need it.
            self._follower.instance_key, self._follower.on_unregistered = instance.key, registration.renew
            apply(self._follower.worker)
            async with (
                _background(registration.run()) as registering,
                _background(self._until_forbidden(config)) as allowed,
            ):
                try:
                    async with _background(self._announce(registration.registered, instance)):
                        await lifecycle.until_stopped(self._stop, working, registering, following, allowed)
                finally:
                    # Drain also after the worker failed for good, so that gates send callers elsewhere first.
                    self._follower.on_worker = lambda _: None
                    worker.configure(delay_s=0)
                    await self._drain(registration)
                    if spans:
                        spans.close()

    def _check_scripts(self, config: NetConfig) -> None:
        """Raise StartError if the release is a script and the worker config forbids those."""
        if config.script and self._follower.worker.scripts == "forbid":
            raise StartError(f"the release has a net.py, and the worker config of {self._settings.app} forbids scripts")

    async def _until_forbidden(self, config: NetConfig) -> None:
        """Wait until the worker config forbids the script that runs. Raises StartError then."""
        while True:
            await self._worker_changed.wait()
            self._worker_changed.clear()
            self._check_scripts(config)

    def _loaded(self, config: NetConfig, worker: WorkerSupervisor) -> dict[str, Any]:
        return {"digest": self._digest, "files": self._files, "plan": _plan(config, worker)}

    def _mark_outdated(self, outdated: bool) -> None:
        self._status.outdated = outdated
        self._status.write()

    async def _announce(self, registered: asyncio.Event, instance: Instance) -> None:
        # Report SERVING only after gates can know the instance: a rollout then stops another one.
        await registered.wait()
        await self._server.set_serving(True)
        self._status.set(State.SERVING, address=instance.address)
        self._log.info("service ready", address=instance.address)

    async def _drain(self, registration: Registration) -> None:
        self._log.info("service draining", in_flight=self._capacity.in_flight)
        self._status.set(State.LEAVING)
        self._capacity.drain()
        await self._server.set_serving(False)
        # The grace includes the time to send the last replies.
        grace_s = self._settings.grace_s
        stop_s = min(_STOP_S, grace_s / 2)
        try:
            async with asyncio.timeout(grace_s - stop_s):
                await asyncio.gather(registration.deregister(), self._capacity.drained(), asyncio.sleep(_LINGER_S))
                # Calls that have arrived in part are refused once they are whole, and long answers leave.
                await self._links.settled()
        except TimeoutError:
            self._log.warning("grace expired", in_flight=self._capacity.in_flight)
        self._listener.close()
        await asyncio.gather(self._server.stop(stop_s), self._links.stop(stop_s))
        self._log.info("service stopped")


def _log_sandbox(logger: structlog.stdlib.BoundLogger, sandbox: Sandbox) -> None:
    fields = {"mode": sandbox.mode, "network": sandbox.network, "holds": sandbox.holds}
    if sandbox.missing:
        logger.warning("sandbox incomplete", **fields, reason="; ".join(sandbox.missing))
    else:
        logger.info("sandbox ready", **fields)


def _check_held(config: NetConfig, max_held_bytes: int) -> None:
    """Raise StartError if the largest request of the release can never be taken."""
    largest = config.limits.most_held_bytes(one=not config.script)
    # Large requests get three quarters.
    least = -(-largest // (3 << 18))
    if max_held_bytes < least << 20:
        raise StartError(
            f"--max-held is {max_held_bytes >> 20}, should be at least {least}: "
            f"a request of the release can take {largest} bytes"
        )


def _plan(config: NetConfig, worker: WorkerSupervisor) -> dict[str, Any]:
    plan = worker.plan
    return {
        "device": config.use_device,
        "batch_size": plan.batch_size,
        "engines": plan.engines,
        "preparers": plan.preparers,
    }


def _instance(settings: InstanceSettings, id_: str, port: int, loaded: Mapping[str, Any]) -> Instance:
    address = advertised_address(settings.advertise, settings.listen, port, settings.registries[0])
    names = {"app": settings.app, "version": settings.version, "id": id_}
    since = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return validate(Instance, {**names, "address": address, "capacity": 1, "since": since, **loaded})
    except MalformedConfig as error:
        raise StartError(f"gates can't use this address, see --advertise: {error}") from None


@asynccontextmanager
async def _exported(tracer: Tracer | None) -> AsyncIterator[None]:
    """Export the spans that are left at the end of the block."""
    try:
        yield
    finally:
        if tracer:
            await tracer.close()


@asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run ``work`` during the block; cancel and await it at the end."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        await lifecycle.end([task])
