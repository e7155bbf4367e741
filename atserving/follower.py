"""Follows the config over any of the registries, and keeps the last known config during an outage."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import structlog

from atserving import lifecycle, misplaced_rules, transport
from atserving.config import CLOSED, ConfigValue, MalformedConfig, is_access_rules, parse
from atserving.config_cache import ConfigCache
from atserving.holdback import Holdback
from atserving.peers import Peers
from atserving.tls import Tls
from atserving.v1 import registry_pb2, registry_pb2_grpc

log = structlog.get_logger()

_FIRST_RESPONSE_S = 3.0
_PAUSE_S = (0.1, 0.5)
_REMIND_S = 10.0
_SAVE_S = 5.0
"""The least time from one save of the config to the next."""

OnChange = Callable[[Mapping[str, ConfigValue], Set[str]], None]
"""Called with the written and the deleted keys of one step; never with an empty step."""


@asynccontextmanager
async def reminding(reason: Callable[[], str]) -> AsyncIterator[None]:
    """Log every few seconds why the block inside is still waiting."""

    async def remind() -> None:
        while True:
            await asyncio.sleep(_REMIND_S)
            log.warning("start delayed", reason=reason())

    task = asyncio.create_task(remind())
    try:
        yield
    finally:
        await lifecycle.end([task])


class ConfigFollower:
    """The config of one app, or of all apps, kept up to date from the registries.

    ``entries`` is always consistent, since each step of the stream is applied as a whole. If a registry fails, the
    follower moves to the next one. It also moves on if a registry has lost etcd and there is another. It forgets
    nothing in the meantime. A DNS name may stand for several registries.

    For ``hold_s`` seconds it keeps what a new snapshot lacks, if that is half of the releases or more
    (:mod:`atserving.holdback`). It compares a first snapshot with the config that it last saved to the file ``cache``.
    If no registry answers at the start, it begins with that config.
    """

    def __init__(
        self,
        registries: Sequence[str],
        on_change: OnChange | None = None,
        app: str = "",
        *,
        hold_s: float = 0,
        cache: Path | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.entries: dict[str, ConfigValue] = {}
        self.synced = asyncio.Event()
        """Set after the first snapshot, or by the saved config; never cleared."""
        self.last_error = "not yet tried"
        self.revision = 0
        """The etcd revision of the config; 0: there is none, or it is a saved one."""
        self.is_following = False
        """Whether a registry tells of each change."""
        self._followed_s = time.time()
        self._registries = Peers(registries)
        self._tls = tls
        self._on_change = on_change
        self._app = app
        self._steps = 0
        self._cache = ConfigCache(cache, app) if cache else None
        self._to_save = asyncio.Event()
        self._hold_s = hold_s
        self._holdback = Holdback(hold_s, self._take_held)

    @property
    def age_s(self) -> float:
        """Seconds since the follower last followed a registry, or since the saved config was; 0 while it does."""
        return 0.0 if self.is_following else max(0.0, time.time() - self._followed_s)

    async def run(self) -> None:
        """Follow until cancelled, one registry after the other, with a pause after each round."""
        saving = asyncio.create_task(self._save(self._cache)) if self._cache else None
        try:
            await self._rounds()
        finally:
            if saving:
                saving.cancel()
                await asyncio.gather(saving, return_exceptions=True)

    async def _rounds(self) -> None:
        saved = self._load(self._cache) if self._cache and self._hold_s else None
        if saved:
            # So that a first snapshot that lacks most releases is held back, too.
            self._apply(saved)
        unread = self._cache
        while True:
            addresses = await self._registries.resolve()
            for address in addresses:
                began = self._steps
                try:
                    async with transport.channel(address, tls=self._tls) as channel:
                        reason = await self._follow(channel, alone=len(addresses) == 1)
                except grpc.aio.AioRpcError as error:
                    reason = error.details() or error.code().name
                except TimeoutError:
                    reason = "does not answer"
                finally:
                    if self.is_following:
                        self.is_following, self._followed_s = False, time.time()
                self.last_error = f"registry {address}: {reason}"
                if self._steps > began:
                    log.warning("registry lost", reason=self.last_error)
            if unread and not self.synced.is_set():
                if saved is None and (saved := self._load(unread)):
                    self._apply(saved)
                if saved:
                    self.synced.set()
            unread = None
            await asyncio.sleep(random.uniform(*_PAUSE_S))  # noqa: S311 - spreads reconnects

    def _load(self, cache: ConfigCache) -> registry_pb2.WatchResponse | None:
        saved = cache.load()
        if saved and not self._steps:
            self._followed_s = cache.saved_s
        return saved

    async def _save(self, cache: ConfigCache) -> None:
        """Save the config after changes."""
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            await asyncio.to_thread(cache.save, dict(self.entries))
            await asyncio.sleep(_SAVE_S)

    async def _follow(self, channel: grpc.aio.Channel, alone: bool) -> str:
        """Follow one registry; return the reason to move to the next."""
        call = registry_pb2_grpc.RegistryServiceStub(channel).Watch(registry_pb2.WatchRequest(app=self._app))
        # Not wait_for: before Python 3.12 it loses a cancellation that comes in the moment in which the read ends.
        async with asyncio.timeout(_FIRST_RESPONSE_S):
            response = await call.read()
        step = registry_pb2.WatchResponse()
        while isinstance(response, registry_pb2.WatchResponse):
            if response.stale and self._steps and not alone:
                # The entries may be newer than the snapshot of a registry without etcd; saved ones hardly are.
                return "has lost etcd"
            step.MergeFrom(response)
            if not response.more:
                self._apply(step)
                self.revision, self.is_following = step.revision, True
                self._steps += 1
                self._to_save.set()
                self.synced.set()
                step = registry_pb2.WatchResponse()
            response = await call.read()
        return "ended the stream"

    def _apply(self, response: registry_pb2.WatchResponse) -> None:
        upserts: dict[str, ConfigValue] = {}
        for entry in response.upserts:
            # A newer registry may send a value that this process can't parse.
            try:
                upserts[entry.key] = parse(entry.key, entry.value_json)
            except MalformedConfig as error:
                log.warning("config skipped", key=entry.key, reason=str(error))
                if is_access_rules(entry.key) or misplaced_rules.may_hold(entry.key, entry.value_json):
                    upserts[entry.key] = CLOSED
        written = {entry.key for entry in response.upserts}
        deletes: Set[str] = set(response.deletes)
        if response.reset:
            deletes = self.entries.keys() - written
        # The registry has checked its own steps.
        reset = response.reset
        deletes = self._holdback.taken(self.entries.keys(), written, deletes, snapshot=reset, vetted=not reset)
        self._change(upserts, deletes)

    def _take_held(self, keys: Set[str]) -> None:
        self._change({}, keys)
        self._to_save.set()

    def _change(self, upserts: Mapping[str, ConfigValue], deletes: Set[str]) -> None:
        upserts = {key: value for key, value in upserts.items() if self.entries.get(key) != value}
        deletes = deletes & self.entries.keys()
        self.entries.update(upserts)
        for key in deletes:
            del self.entries[key]
        if self._on_change and (upserts or deletes):
            self._on_change(upserts, deletes)
