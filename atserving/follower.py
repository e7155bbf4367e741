"""Follows the config that the registries stream, over any of them, and keeps the last known while none answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager

import grpc.aio
import structlog

from atserving import transport
from atserving.addresses import Addresses
from atserving.config import ConfigValue, MalformedConfig, parse
from atserving.v1 import registry_pb2, registry_pb2_grpc

log = structlog.get_logger()

_FIRST_RESPONSE_S = 3.0
_PAUSE_S = (0.1, 0.5)
_REMIND_S = 10.0

OnChange = Callable[[Mapping[str, ConfigValue], Set[str]], None]
"""Called with the keys written and the keys deleted by one step; never with an empty step."""


@asynccontextmanager
async def reminding(reason: Callable[[], str]) -> AsyncIterator[None]:
    """Logs, while the block takes long, what it waits for."""

    async def remind() -> None:
        while True:
            await asyncio.sleep(_REMIND_S)
            log.warning("start delayed", reason=reason())

    task = asyncio.create_task(remind())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class ConfigFollower:
    """Holds what the registries say of one app, or of all.

    ``entries`` is always one consistent state: every step of the stream is applied whole. A registry that has gone is
    replaced by the next of the list, and so is one that has lost etcd, if there is another; meanwhile nothing is
    forgotten. A name may stand for several registries.
    """

    def __init__(self, registries: Sequence[str], on_change: OnChange | None = None, app: str = "") -> None:
        self.entries: dict[str, ConfigValue] = {}
        self.synced = asyncio.Event()
        """Set once the first snapshot has been applied; never cleared."""
        self.last_error = "not yet tried"
        self._registries = Addresses(registries)
        self._on_change = on_change
        self._app = app
        self._steps = 0

    async def run(self) -> None:
        """Follows until cancelled, one registry after the other, with a pause once all were tried."""
        while True:
            addresses = await self._registries.resolve()
            for address in addresses:
                began = self._steps
                try:
                    async with transport.channel(address) as channel:
                        reason = await self._follow(channel, alone=len(addresses) == 1)
                except grpc.aio.AioRpcError as error:
                    reason = error.details() or error.code().name
                except TimeoutError:
                    reason = "does not answer"
                self.last_error = f"registry {address}: {reason}"
                if self._steps > began:
                    log.warning("registry lost", reason=self.last_error)
            await asyncio.sleep(random.uniform(*_PAUSE_S))  # noqa: S311 - spreads reconnects

    async def _follow(self, channel: grpc.aio.Channel, alone: bool) -> str:
        """Returns why this registry is left."""
        call = registry_pb2_grpc.RegistryServiceStub(channel).Watch(registry_pb2.WatchRequest(app=self._app))
        response = await asyncio.wait_for(call.read(), _FIRST_RESPONSE_S)
        while isinstance(response, registry_pb2.WatchResponse):
            if response.stale and self.synced.is_set() and not alone:
                # What is known here may be newer than its snapshot.
                return "has lost etcd"
            self._apply(response)
            self._steps += 1
            self.synced.set()
            response = await call.read()
        return "ended the stream"

    def _apply(self, response: registry_pb2.WatchResponse) -> None:
        upserts: dict[str, ConfigValue] = {}
        for entry in response.upserts:
            # The registry sends what it could read; what this, perhaps older, process can't read is skipped.
            try:
                upserts[entry.key] = parse(entry.key, entry.value_json)
            except MalformedConfig as error:
                log.warning("config skipped", key=entry.key, reason=str(error))
        deletes = set(response.deletes)
        if response.reset:
            deletes = self.entries.keys() - {entry.key for entry in response.upserts}
        upserts = {key: value for key, value in upserts.items() if self.entries.get(key) != value}
        deletes &= self.entries.keys()
        self.entries.update(upserts)
        for key in deletes:
            del self.entries[key]
        if self._on_change and (upserts or deletes):
            self._on_change(upserts, deletes)
