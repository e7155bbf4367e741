"""A pod as a local process: the command, arguments, environment, files, ports and probes of its manifest.

Two things are mapped: the container's addresses to one loopback address, and its paths to a folder. A mount namespace
gives the process the cluster's names as /etc/hosts, and makes everything but its volumes read-only. The rest is as in
the manifest: a wrong flag, path or probe there fails here.
"""

from __future__ import annotations

import asyncio
import base64
import re
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from atserving.local.child import bound_to_parent
from atserving.local.commands import BIN
from tests.k8s.container import expanded, image_config
from tests.k8s.mount_namespace import in_namespace
from tests.k8s.probes import passes

Files = Mapping[str, bytes]
Volumes = Callable[[dict[str, Any]], Files | Path]
"""Returns the files of a volume of a pod's spec, by name, or the folder that the pod shares with others."""


class PodError(AssertionError):
    """A pod did something that makes a cluster restart or kill it."""


class Pod:
    """A pod with one container."""

    def __init__(
        self,
        manifest: dict[str, Any],
        name: str,
        ip: str,
        folder: Path,
        values: Callable[[dict[str, Any]], str],
        volumes: Volumes,
        hosts: Path | None,
    ) -> None:
        """``values`` looks up a ``configMapKeyRef``. ``hosts`` replaces /etc/hosts in the pod."""
        self.name, self.ip, self.labels = name, ip, manifest["metadata"]["labels"]
        self.ready = self.terminating = False
        self.ready_since = 0.0
        self._spec = manifest["spec"]
        (self._container,) = self._spec["containers"]
        self._folder = folder
        self._hosts = hosts or Path("/etc/hosts")
        self._ports = {each["name"]: int(each["containerPort"]) for each in self._container["ports"]}
        self._environment = self._read_environment(values)
        self._paths = self._mount(volumes)
        self._process: asyncio.subprocess.Process | None = None
        self._probing: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self.failure: PodError | None = None

    @property
    def component(self) -> str:
        return str(self.labels["app.kubernetes.io/component"])

    def connections(self) -> list[tuple[str, int]]:
        """Return the remote ends of the process's TCP connections."""
        assert self._process
        connections = psutil.Process(self._process.pid).net_connections("tcp")
        return [(each.raddr.ip.removeprefix("::ffff:"), each.raddr.port) for each in connections if each.raddr]

    def listens_on(self, port: int) -> bool:
        """Whether the manifest declares the port."""
        return port in self._ports.values()

    async def start(self) -> None:
        """Start the container's process and its probes. A stopped one starts again with the files that it left."""
        self.ready = self.terminating = False
        environment = {name: self._here(value) for name, value in self._environment.items()}
        if "/tmp" in self._paths:
            environment["TMPDIR"] = str(self._paths["/tmp"])
        with self.log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(),
                cwd=self._folder,
                env={"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(self._folder), **environment},
                stdout=log,
                stderr=log,
            )
        self._probing = asyncio.create_task(self._probe())

    def _command(self) -> list[str]:
        given = self._container.get("command") or image_config(self._container["image"])[0]
        command = [*given, *self._container.get("args", [])]
        program = sys.executable if command[0] == "python" else command[0]
        arguments = [self._here(expanded(each, self._environment)) for each in command[1:]]
        return in_namespace([program, *arguments], self._hosts, self._writable)

    async def wait_ready(self, patience_s: float) -> None:
        """Wait until it is ready. Raises PodError if a cluster would restart it, or a declared port does not listen."""
        async with asyncio.timeout(patience_s), self._changed:
            await self._changed.wait_for(lambda: self.ready or self.failure)
        self.check()
        assert self._process
        listening = psutil.Process(self._process.pid).net_connections("tcp")
        ports = {each.laddr.port for each in listening if each.status == psutil.CONN_LISTEN}
        if missing := set(self._ports.values()) - ports:
            raise self._error(f"does not listen on {missing}")

    def check(self) -> None:
        """Raise PodError if a cluster would have restarted it."""
        if self.failure:
            raise self.failure

    async def stop(self) -> None:
        """Stop it as a kubelet does: hook, SIGTERM and wait, within the grace period. Raises PodError."""
        self.terminating = True
        self.check()
        try:
            async with asyncio.timeout(self._spec["terminationGracePeriodSeconds"]):
                await self._pre_stop()
                self.check()
                await self._end_probing()
                assert self._process
                self._process.terminate()
                status = await self._process.wait()
        except TimeoutError:
            raise self._error("did not stop within its terminationGracePeriodSeconds") from None
        finally:
            await self.kill()
        # Our services exit with 0; other programs may die from the signal.
        if status != 0 and not (status == -signal.SIGTERM and "command" in self._container):
            raise self._error(f"ended with status {status}")

    async def _pre_stop(self) -> None:
        match self._container.get("lifecycle", {}).get("preStop"):
            case {"sleep": {"seconds": seconds}}:
                await asyncio.sleep(seconds)
            case {"exec": {"command": [program, *arguments]}}:
                hook = await asyncio.create_subprocess_exec(
                    *bound_to_parent([program, *map(self._here, arguments)]),
                    stderr=asyncio.subprocess.PIPE,
                    cwd=self._folder,
                )
                try:
                    _, errors = await hook.communicate()
                finally:
                    if hook.returncode is None:
                        hook.kill()
                if hook.returncode or errors:
                    raise self._error(f"failed in its preStop hook: {errors.decode()}")
            case None:
                pass
            case other:
                raise self._error(f"has a hook of an unknown kind: {other}")

    async def kill(self) -> None:
        """Kill it, without effect if it has ended."""
        await self._end_probing()
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _end_probing(self) -> None:
        if self._probing:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    async def _probe(self) -> None:
        assert self._process
        ended = asyncio.create_task(self._process.wait())
        probes = asyncio.create_task(self._probes())
        try:
            await asyncio.wait({ended, probes}, return_when=asyncio.FIRST_COMPLETED)
            failure = self._error(f"ended by itself with status {ended.result()}") if ended.done() else probes.result()
            await self._set(ready=False, failure=failure)
        finally:
            ended.cancel()
            probes.cancel()
            await asyncio.gather(ended, probes, return_exceptions=True)

    async def _probes(self) -> PodError:
        """Probe until a probe fails so that the container has to be restarted; return the failure."""
        started = self._container["startupProbe"]
        for _ in range(started["failureThreshold"]):
            if await passes(started, self.ip, self._ports):
                break
            await asyncio.sleep(started["periodSeconds"])
        else:
            return self._error("failed its startup probe")
        readiness = asyncio.create_task(self._watch_readiness())
        try:
            return await self._watch_liveness()
        finally:
            readiness.cancel()
            await asyncio.gather(readiness, return_exceptions=True)

    async def _watch_readiness(self) -> None:
        probe, failures = self._container["readinessProbe"], 0
        while True:
            good = await passes(probe, self.ip, self._ports)
            failures = 0 if good else failures + 1
            if good or failures >= probe["failureThreshold"]:
                await self._set(ready=good)
            await asyncio.sleep(probe["periodSeconds"])

    async def _watch_liveness(self) -> PodError:
        probe, failures = self._container["livenessProbe"], 0
        while failures < probe["failureThreshold"]:
            good = await passes(probe, self.ip, self._ports)
            failures = 0 if good else failures + 1
            await asyncio.sleep(probe["periodSeconds"])
        return self._error("failed its liveness probe")

    async def _set(self, ready: bool, failure: PodError | None = None) -> None:
        async with self._changed:
            if ready and not self.ready:
                self.ready_since = asyncio.get_running_loop().time()
            self.ready, self.failure = ready, failure or self.failure
            self._changed.notify_all()

    def _error(self, what: str) -> PodError:
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return PodError("\n".join([f"pod {self.name} {what}; the end of its log:", *lines[-15:]]))

    @property
    def log_path(self) -> Path:
        return self._folder / "log"

    def _read_environment(self, values: Callable[[dict[str, Any]], str]) -> dict[str, str]:
        _, environment = image_config(self._container["image"])
        fields = {"metadata.name": self.name, "status.podIP": self.ip}
        for each in self._container.get("env", []):
            match each:
                case {"value": value}:
                    environment[each["name"]] = expanded(value, environment)
                case {"valueFrom": {"fieldRef": {"fieldPath": field}}}:
                    environment[each["name"]] = fields[field]
                case {"valueFrom": {"configMapKeyRef": reference}}:
                    environment[each["name"]] = values(reference)
        return environment

    def _mount(self, volumes: Volumes) -> dict[str, Path]:
        """Write the files of the volumes. Return the local path of each path in the container."""
        by_name = {each["name"]: each for each in self._spec.get("volumes", [])}
        paths = {"/dev/termination-log": self._folder / "termination-log"}
        files: dict[str, Files] = {}
        for mount in self._container.get("volumeMounts", []):
            path = mount["mountPath"]
            found = volumes(by_name.get(mount["name"], {"name": mount["name"]}))
            paths[path] = found if isinstance(found, Path) else self._folder / path.lstrip("/")
            files |= {} if isinstance(found, Path) else {path: found}
        paths["/dev/termination-log"].touch()
        self._paths, self._writable = paths, [paths["/dev/termination-log"]]
        for mount in self._container.get("volumeMounts", []):
            if mount["mountPath"] not in files:
                continue
            here = paths[mount["mountPath"]]
            here.mkdir(parents=True)
            if not mount.get("readOnly"):
                self._writable.append(here)
            for name, content in files[mount["mountPath"]].items():
                (here / name).write_bytes(self._file(content))
        return paths

    def _file(self, content: bytes) -> bytes:
        try:
            return self._here(content.decode()).encode()
        except UnicodeDecodeError:
            return content

    def _here(self, text: str) -> str:
        """Replace the container's own addresses and paths in a text with the local ones, in one pass."""
        paths = sorted(self._paths, key=len, reverse=True)
        pattern = (
            rf"(?<![\w.])(0\.0\.0\.0|127\.0\.0\.1)(?![\w.])|(?<![\w./-])({'|'.join(map(re.escape, paths))})(?![\w.-])"
        )
        return re.sub(pattern, lambda found: self.ip if found[1] else str(self._paths[found[2]]), text)


def config_map_files(config_map: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a ConfigMap by name."""
    text = {name: content.encode() for name, content in config_map.get("data", {}).items()}
    return text | {name: base64.b64decode(content) for name, content in config_map.get("binaryData", {}).items()}
