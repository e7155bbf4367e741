"""Follows the config of one version: its release, read once, and its worker config, which may change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import structlog

from atserving.config import DEFAULT_WORKER, ConfigValue, Release, WorkerConfig, release_key, worker_keys
from atserving.errors import StartError
from atserving.follower import ConfigFollower, reminding
from atserving.tls import Tls

log = structlog.get_logger()


class VersionConfigFollower:
    """Follows one version of one app at any of the registries."""

    def __init__(
        self,
        registries: Sequence[str],
        app: str,
        version: str,
        cache: Path | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.on_worker: Callable[[WorkerConfig], None] = lambda _: None
        """The follower calls this with the worker config after each change."""
        self.on_outdated: Callable[[bool], None] = lambda _: None
        """The follower calls this when the release gets other content than was loaded, and when that is gone again."""
        self.outdated = False
        """Whether the release has other content now."""
        self.instance_key = ""
        """The key under which the instance is registered, once it is."""
        self.on_unregistered: Callable[[], None] = lambda: None
        """The follower calls this when that key is gone, as after etcd was restored from a snapshot."""
        self._loaded = ""
        self._app, self._version = app, version
        self._key = release_key(app, version)
        self._follower = ConfigFollower(registries, self._changed, app, cache=cache, tls=tls)
        self._published = asyncio.Event()
        self._worker = self.worker

    async def run(self) -> None:
        """Follow until cancelled."""
        await self._follower.run()

    async def release(self, wait_s: float) -> Release:
        """Wait for the release for ``wait_s`` seconds (0: without limit) and return it.

        Raises StartError if no registry answers, or none has published it.
        """
        try:
            async with reminding(self._missing), asyncio.timeout(wait_s or None):
                await self._published.wait()
        except TimeoutError:
            if not self._follower.synced.is_set():
                raise StartError(f"no registry within {wait_s:g} s: {self._follower.last_error}") from None
        release = self._follower.entries.get(self._key)
        if not isinstance(release, Release):
            raise StartError(
                f"{self._app} {self._version} was not published within {wait_s:g} s, or its release is malformed"
            )
        self._loaded = release.digest
        return release

    def _missing(self) -> str:
        if not self._follower.synced.is_set():
            return f"no registry: {self._follower.last_error}"
        return f"{self._app} {self._version} is not published, or its release is malformed"

    @property
    def worker(self) -> WorkerConfig:
        """The worker config with every field set; the most specific key wins, field by field."""
        config = WorkerConfig()
        for key in worker_keys(self._app, self._version):
            value = self._follower.entries.get(key)
            if isinstance(value, WorkerConfig):
                config = config.over(value)
        return config.over(DEFAULT_WORKER)

    def _changed(self, upserts: Mapping[str, ConfigValue], deletes: Set[str]) -> None:
        if self._key in upserts:
            self._published.set()
        if self._key in deletes:
            log.warning("release deleted", app=self._app, version=self._version)
        if self.instance_key in deletes:
            self.on_unregistered()
        release = upserts.get(self._key)
        if self._loaded and isinstance(release, Release):
            self._compare(release)
        worker = self.worker
        if worker != self._worker:
            self._worker = worker
            self.on_worker(worker)

    def _compare(self, release: Release) -> None:
        outdated = release.digest != self._loaded
        if outdated == self.outdated:
            return
        self.outdated = outdated
        if outdated:
            log.warning("instance outdated", app=self._app, version=self._version)
        else:
            log.info("instance current", app=self._app, version=self._version)
        self.on_outdated(outdated)
