"""One instance's life: listen, load, warm up, register, say so; serve; leave, drain, stop."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from atserving import lifecycle, transport
from atserving.config import Instance, MalformedConfig, WorkerConfig, validate
from atserving.errors import StartError
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc
from evaluator.fetching.addresses import AddressPolicy, Network
from evaluator.fetching.qiniu import QiniuConfig
from evaluator.fetching.release import fetch_release
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Limits
from evaluator.net_contract import DEFAULT_NET, SCRIPT
from evaluator.serving.capacity import Capacity
from evaluator.serving.metrics import Metrics
from evaluator.serving.ops_http import OpsServer
from evaluator.serving.pipeline import Pipeline
from evaluator.serving.registration import Registration
from evaluator.serving.release_config import VersionConfigFollower
from evaluator.serving.server import EvaluatorServicer
from evaluator.serving.status import State, Status
from evaluator.serving.supervisor import WorkerSupervisor

log = structlog.get_logger()

# Gates learn within this time that an instance has left; until then it answers, if only to refuse.
_LINGER_S = 0.5
# What is not finished after the grace is cut off; this is for the last answers on their way out.
_STOP_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class InstanceSettings:
    """What the flags say."""

    app: str
    version: str
    registries: Sequence[str]
    listen: str
    advertise: str | None = None
    workspace: Path | None = None
    wait_s: float = 10.0
    grace_s: float = 30.0
    allow_networks: Sequence[Network] = ()
    qiniu: QiniuConfig | None = None
    http: str = "127.0.0.1:0"
    status_file: Path | None = None


async def run(settings: InstanceSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises StartError, which the status says too."""
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
    """What an instance consists of, and the order in which it comes and goes."""

    def __init__(self, settings: InstanceSettings, status: Status) -> None:
        self._settings = settings
        self._status = status
        self._metrics = Metrics()
        self._capacity = Capacity(1)
        self._config = VersionConfigFollower(settings.registries, settings.app, settings.version)
        self._server = transport.Server([evaluator_pb2.DESCRIPTOR.services_by_name["EvaluatorService"]])
        self._servicer = EvaluatorServicer(self._metrics, settings.app, settings.version)
        evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(self._servicer, self._server.grpc)
        self._stop = lifecycle.stop_signal()

    async def run(self) -> None:
        settings = self._settings
        log.debug("starting", app=settings.app, version=settings.version, registries=settings.registries)
        with _workspace(settings) as workspace:
            async with (
                OpsServer(settings.http, self._metrics, self._status) as http,
                _background(self._config.run()) as following,
                AsyncExitStack() as beside,
            ):
                # From the start, so that one can see that this process lives, however long the net takes to load.
                port = await self._server.start(settings.listen)
                beside.push_async_callback(self._server.stop, 0)
                worker = await _unless(self._stop, following, self._load(workspace, beside, http.port))
                if worker:
                    await self._serve(worker, port, following)

    async def _load(self, workspace: Path, beside: AsyncExitStack, http_port: int) -> WorkerSupervisor:
        settings = self._settings
        release = await self._config.release(settings.wait_s)
        log.info("loading", app=settings.app, version=settings.version, http_port=http_port)
        cfg = (await fetch_release(release, workspace, settings.qiniu)).cfg()
        self._limits = Limits.of_release(cfg["custom_values"])
        self._built_in = None if SCRIPT in cfg["tar_files"] else str(cfg["custom_values"].get("net", DEFAULT_NET))
        worker = WorkerSupervisor(cfg)
        beside.push_async_callback(worker.close)
        await worker.start()
        self._status.device, self._status.plan = cfg["use_device"], worker.plan
        log.info("warm", app=settings.app, version=settings.version, device=cfg["use_device"], **asdict(worker.plan))
        return worker

    async def _serve(self, worker: WorkerSupervisor, port: int, following: asyncio.Task[None]) -> None:
        settings, capacity = self._settings, self._capacity
        self._metrics.of_worker(worker)
        self._metrics.of_capacity(lambda: capacity.in_flight, lambda: capacity.limit)
        policy = AddressPolicy(settings.allow_networks)
        async with (
            ResourceFetcher(self._limits.max_bytes, policy, settings.qiniu) as fetcher,
            _background(worker.run()) as working,
        ):
            self._servicer.pipeline = Pipeline(worker, fetcher, capacity, self._limits, self._built_in)
            instance = await asyncio.to_thread(_instance, settings, port)
            registration = Registration(
                settings.registries, lambda: instance.model_copy(update={"capacity": capacity.limit})
            )

            def apply(config: WorkerConfig) -> None:
                assert config.max_concurrent is not None
                assert config.delay4batch is not None
                capacity.limit = config.max_concurrent
                worker.configure(delay_s=config.delay4batch.total_seconds())
                registration.renew()

            self._config.on_worker = apply
            apply(self._config.worker)
            async with _background(registration.run()) as registering:
                try:
                    async with _background(self._announce(registration.registered, instance)):
                        await lifecycle.until_stopped(self._stop, working, registering, following)
                finally:
                    # Also where the net can't be kept running: callers are sent elsewhere before this process ends.
                    self._config.on_worker = lambda _: None
                    worker.configure(delay_s=0)
                    await self._leave(registration)

    async def _announce(self, registered: asyncio.Event, instance: Instance) -> None:
        # Not before gates can know of it: who waits for this to stop another instance would leave them without any.
        await registered.wait()
        await self._server.set_serving(True)
        self._status.set(State.SERVING, address=instance.address)
        log.info("serving", app=instance.app, version=instance.version, address=instance.address)

    async def _leave(self, registration: Registration) -> None:
        log.info("leaving", held=self._capacity.in_flight)
        self._status.set(State.LEAVING)
        self._capacity.drain()
        await self._server.set_serving(False)
        # The last answers are on their way within the grace too.
        grace_s = self._settings.grace_s
        stop_s = min(_STOP_S, grace_s / 2)
        try:
            async with asyncio.timeout(grace_s - stop_s):
                await asyncio.gather(registration.deregister(), self._capacity.drained(), asyncio.sleep(_LINGER_S))
        except TimeoutError:
            log.warning("the grace is over", held=self._capacity.in_flight)
        await self._server.stop(stop_s)
        log.info("stopped")


def _instance(settings: InstanceSettings, port: int) -> Instance:
    fields = {"app": settings.app, "version": settings.version, "id": secrets.token_hex(8), "capacity": 1}
    try:
        return validate(Instance, {**fields, "address": _address(settings, port)})
    except MalformedConfig as error:
        raise StartError(f"gates can't use this address, see --advertise: {error}") from None


def _address(settings: InstanceSettings, port: int) -> str:
    """``host:port`` for others to reach: as advertised, else as listened on, else this machine's towards a registry."""
    host, _, given = (settings.advertise or settings.listen).rpartition(":")
    if settings.advertise:
        return f"{host}:{int(given) or port}"
    if host not in ("", "0.0.0.0", "[::]", "*"):  # noqa: S104 - recognised, not bound
        return f"{host}:{port}"
    registry_host, _, registry_port = settings.registries[0].rpartition(":")
    try:
        family, kind, proto, _, target = socket.getaddrinfo(
            registry_host.strip("[]"), int(registry_port), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, proto) as probe:
            # A datagram socket sends nothing to connect; it only picks the route.
            probe.connect(target)
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise StartError("can't tell this machine's address: give --advertise") from error
    return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"


@contextmanager
def _workspace(settings: InstanceSettings) -> Iterator[Path]:
    """A folder of this process alone, removed in the end."""
    try:
        if settings.workspace:
            settings.workspace.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f"{settings.app}-{settings.version}-", dir=settings.workspace)
    except OSError as error:
        raise StartError(f"can't make a workspace: {error.strerror}") from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Runs ``work`` meanwhile; cancels and awaits it in the end."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _unless(stop: asyncio.Event, following: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None where ``stop`` comes first. Raises what ``following`` raised too."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(lifecycle.until_stopped(stop, following))
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        stopping.result()
        return None
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)
