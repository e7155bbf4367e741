"""One instance's life: load, warm up, listen, say so, register; serve; leave, drain, stop."""

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

from atserving import transport
from atserving.config import Instance, MalformedConfig, WorkerConfig, validate
from atserving.errors import StartError
from atserving.v1 import evaluator_pb2, evaluator_pb2_grpc
from evaluator.addresses import AddressPolicy, Network
from evaluator.followed import FollowedConfig
from evaluator.images import Limits
from evaluator.pipeline import Pipeline
from evaluator.places import Places
from evaluator.qiniu import QiniuConfig
from evaluator.registration import Registration
from evaluator.release import fetch_release
from evaluator.resources import ResourceFetcher
from evaluator.server import EvaluatorServicer
from evaluator.worker.worker import Worker

log = structlog.get_logger()

# Gates learn within this time that an instance has left; until then it answers, if only to refuse.
_LINGER_S = 0.5
# What is not finished after the grace is cut off; this is for the last answers on their way out.
_STOP_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
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


@dataclass(frozen=True)
class _Loaded:
    worker: Worker
    limits: Limits


async def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. Raises StartError."""
    stop = transport.stop_signal()
    followed = FollowedConfig(settings.registries, settings.app, settings.version)
    log.debug("starting", app=settings.app, version=settings.version, registries=settings.registries)
    with _workspace(settings) as workspace:
        async with _background(followed.run()) as following, AsyncExitStack() as beside:
            loaded = await _unless(stop, _load(settings, followed, workspace, beside))
            if loaded:
                await _serve(settings, followed, loaded, stop, following)


async def _load(settings: Settings, followed: FollowedConfig, workspace: Path, beside: AsyncExitStack) -> _Loaded:
    cfg = (await fetch_release(await followed.release(settings.wait_s), workspace, settings.qiniu)).cfg()
    limits = Limits.of_release(cfg["custom_values"])
    worker = Worker(cfg)
    beside.push_async_callback(worker.close)
    await worker.start()
    log.info("warm", app=settings.app, version=settings.version, device=cfg["use_device"], **asdict(worker.plan))
    return _Loaded(worker, limits)


async def _serve(
    settings: Settings,
    followed: FollowedConfig,
    loaded: _Loaded,
    stop: asyncio.Event,
    following: asyncio.Task[None],
) -> None:
    worker, places = loaded.worker, Places(1)
    fetcher = ResourceFetcher(loaded.limits.max_bytes, AddressPolicy(settings.allow_networks), settings.qiniu)
    server = transport.Server([evaluator_pb2.DESCRIPTOR.services_by_name["EvaluatorService"]])
    async with fetcher, _background(worker.run()) as working:
        servicer = EvaluatorServicer(Pipeline(worker, fetcher, places), settings.app, settings.version)
        evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server(servicer, server.grpc)
        port = await server.start(settings.listen)
        instance = await asyncio.to_thread(_instance, settings, port)
        registration = Registration(settings.registries, lambda: instance.model_copy(update={"capacity": places.most}))

        def apply(config: WorkerConfig) -> None:
            assert config.max_concurrent is not None
            assert config.delay4batch is not None
            places.most = config.max_concurrent
            worker.configure(delay_s=config.delay4batch.total_seconds())
            registration.renew()

        followed.on_worker = apply
        apply(followed.worker)
        await server.set_serving(True)
        log.info("serving", app=settings.app, version=settings.version, port=port)
        async with _background(registration.run()) as registering:
            try:
                await transport.until_stopped(stop, working, registering, following)
            finally:
                # Also where the net can't be kept running: callers are sent elsewhere before this process ends.
                followed.on_worker = lambda _: None
                worker.configure(delay_s=0)
                await _leave(settings.grace_s, registration, places, server)


async def _leave(grace_s: float, registration: Registration, places: Places, server: transport.Server) -> None:
    log.info("leaving", held=places.held)
    places.drain()
    await server.set_serving(False)
    await asyncio.gather(registration.deregister(), _drained(places, grace_s), asyncio.sleep(_LINGER_S))
    await server.stop(_STOP_S)
    log.info("stopped")


async def _drained(places: Places, grace_s: float) -> None:
    try:
        async with asyncio.timeout(grace_s):
            await places.drained()
    except TimeoutError:
        log.warning("the grace is over", held=places.held)


def _instance(settings: Settings, port: int) -> Instance:
    fields = {"app": settings.app, "version": settings.version, "id": secrets.token_hex(8), "capacity": 1}
    try:
        return validate(Instance, {**fields, "address": _address(settings, port)})
    except MalformedConfig as error:
        raise StartError(f"gates can't use this address, see --advertise: {error}") from None


def _address(settings: Settings, port: int) -> str:
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
def _workspace(settings: Settings) -> Iterator[Path]:
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


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None where ``stop`` comes first."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)
