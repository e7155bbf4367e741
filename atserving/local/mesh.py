"""The whole mesh on one machine: etcd, registry, gates, evaluators and Envoy as local processes."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import aiohttp
import orjson

from atserving import otlp_variables
from atserving.errors import StartError
from atserving.local import commands, envoy, examples
from atserving.local.child import ChildProcess
from atserving.local.envoy_tracing import Export
from atserving.local.examples import ROOT, Example
from atserving.local.folders import PREFIX, TARGETS_FILE
from atserving.local.ports import Ports, check_free, free_ports
from atserving.local.processes import ManagedProcess, ProcessGroup, State
from atserving.local.publishing import publish, release_of, served
from atserving.tls import ENVOY, EVALUATOR, GATE, OPERATOR, REGISTRY, Tls

if TYPE_CHECKING:
    from atserving.local.authority import Authority

_POLL_S = 0.05
_WITH_HTTP = ("registry", "gate", "evaluator")
# What Envoy logs of a file that is wrong; one that names no certificate is none.
_REJECTED = re.compile(r"Filesystem config update (?:rejected|failure): (?!Missing SDS resources)(.+)")
_OPERATOR = "local"


PROMETHEUS_FILE = "prometheus.yml"
"""The file beside it with the config of a Prometheus that watches the mesh."""


class Mesh:
    """A mesh that serves example releases. Its directory holds its config, its data and its logs.

    An async context manager: entering starts every process and waits until each release answers; leaving stops them.
    Envoy starts last, so that its port is closed until every release has an instance.
    The processes are ``etcd``, ``registry``, ``gate``, ``gate-1``, ..., ``envoy``, ``evaluator-<app>-<version>``, and
    ``files``, which serves the folder of the examples at ``files_url``. A process that dies is started again.
    """

    def __init__(
        self,
        edge_port: int = 0,
        serves: Sequence[Example] = examples.DIGITS,
        *,
        gates: int = 1,
        start_timeout_s: float = 90.0,
        extra: Mapping[str, Sequence[str]] | None = None,
        callers: Path | None = None,
        tls: bool = False,
        environment: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``extra`` has more flags for processes, by name: a test shortens a lease with it.

        ``callers`` is a folder with files of Envoy that say who a caller is, in place of those of the checkout.

        ``tls``: all processes speak TLS with each other, by the certificates of an authority of this mesh's own.

        ``environment`` is added to that of all processes. With the variables that switch tracing on, Envoy exports
        spans, too.

        ``tell`` gets a line whenever the start waits for something else.
        """
        self.serves = serves
        self.ports = Ports.free(edge_port, gates)
        self.url = f"http://127.0.0.1:{self.ports.edge}"
        self.has_tls = bool(callers and (callers / envoy.TLS_FILE).exists())
        self.tls_url = f"https://localhost:{self.ports.edge_tls}"
        self.operators_url = f"http://127.0.0.1:{self.ports.operators}"
        self.registry = f"127.0.0.1:{self.ports.registry}"
        self.etcd = f"127.0.0.1:{self.ports.etcd}"
        self.files_url = f"http://127.0.0.1:{self.ports.files}"
        self._start_timeout_s = start_timeout_s
        self._extra = extra or {}
        self._callers = callers
        self._with_tls = tls
        self._environment = environment or {}
        environ = {**os.environ, **self._environment}
        self.export = Export.from_environment(environ)
        """Where Envoy's spans go, None without tracing."""
        if self.export:
            # Else its processes would end one by one, again and again.
            otlp_variables.check(environ)
        self.authority: Authority | None = None
        """The authority of a mesh with TLS."""
        self.tls: Tls | None = None
        """The certificate of its operator, for calls of the registry."""
        self._tell = tell
        self._awaited = ""
        # The port of --http of each process that has one.
        self._http: dict[str, int] = {}

    async def __aenter__(self) -> Mesh:
        for needed in (ROOT / "envoy" / "envoy.yaml", *(each.path for each in self.serves)):
            if not needed.exists():
                raise StartError(f"{needed.relative_to(ROOT)} is missing: run the local mesh from a checkout")
        check_free(self.ports.edge)
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        if self._with_tls:
            await asyncio.to_thread(self._certify)
        envoy.lay_out(ROOT / "envoy", self.directory / "envoy", self._callers, self._certificates(ENVOY))
        bootstrap = envoy.local_bootstrap(
            self.directory / "envoy", self.ports, tls=self.has_tls, mesh_tls=self._with_tls, export=self.export
        )
        (self.directory / "envoy.yaml").write_text(bootstrap)
        self._processes = self._group()
        (self.directory / TARGETS_FILE).write_bytes(orjson.dumps(self.targets(), option=orjson.OPT_INDENT_2))
        # YAML takes JSON, too.
        (self.directory / PROMETHEUS_FILE).write_bytes(orjson.dumps(_prometheus(), option=orjson.OPT_INDENT_2))
        try:
            self._start(*(each.name for each in self._processes if each.name != "envoy"))
            await self._wait_ready()
        except BaseException as error:
            await self._processes.stop()
            # A failed start leaves its logs behind.
            if not isinstance(error, StartError):
                shutil.rmtree(self.directory, ignore_errors=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._processes.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _certify(self) -> None:
        # Only a mesh with TLS needs cryptography.
        from atserving.local.authority import Authority

        self.authority = Authority(self.directory / "certs")
        self.renew_certificates()
        self.tls = Tls(self.authority.files(f"{OPERATOR}/{_OPERATOR}"))

    def renew_certificates(self) -> None:
        """Replace the certificates of all processes of a mesh with TLS, under its authority."""
        assert self.authority
        self.authority.issue_all({each.app for each in self.serves}, [_OPERATOR])

    def _certificates(self, role: str) -> Path | None:
        return self.authority.files(role).cert.parent if self.authority else None

    def _tls(self, role: str) -> list[str]:
        return commands.tls(self.authority.files(role)) if self.authority else []

    def targets(self) -> list[dict[str, object]]:
        """Return the addresses of all ``/metrics``, with the labels ``job`` (gate, evaluator, ...) and ``process``."""
        ports = {**self._http, "envoy": self.ports.ops}
        if not self.authority:
            # With TLS it answers only to its registries.
            ports["etcd"] = self.ports.etcd
        return [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"job": name.partition("-")[0], "process": name}}
            for name, port in ports.items()
        ]

    async def watch(self) -> None:
        """Wait until every process is stopped. Raises the defect that ended the supervision of one."""
        await self._processes.watch()

    async def stop_process(self, name: str) -> None:
        """Stop one process (SIGTERM) and wait until it has ended. It stays down."""
        await self._processes[name].stop()

    def start_process(self, name: str) -> None:
        """Start one process that was stopped."""
        self._processes[name].start()

    def kill_process(self, name: str) -> None:
        """Kill one process (SIGKILL), as a crash would. It is started again."""
        self._processes[name].kill()

    def pids(self) -> dict[str, int]:
        """Return the process id of each process that runs, by name."""
        return {each.name: each.pid for each in self._processes if each.pid}

    def log(self, name: str) -> str:
        """Return all that a process has logged so far."""
        return self._processes[name].log_text()

    def _start(self, *names: str) -> None:
        try:
            for name in names:
                self._processes[name].start()
        except OSError as error:
            raise StartError(f"the mesh's processes cannot be started: {error}") from None

    def _group(self) -> ProcessGroup:
        """Group the processes so that those that serve stop first, then the registry, then etcd."""
        stages: dict[str, list[ManagedProcess]] = {"etcd": [], "registry": [], "serving": []}
        for name, command in self._commands().items():
            log = self.directory / f"{name}.log"
            child = ChildProcess(command, log, cwd=self.directory, environment=self._environment)
            stages.get(name, stages["serving"]).append(ManagedProcess(name, child))
        return ProcessGroup(*stages.values())

    def _commands(self) -> dict[str, list[str]]:
        """Return the command line of each process by its name. Add a new service here."""
        ports, directory = self.ports, self.directory
        # A socket in the folder of the mesh: there are no peers.
        peers = {"default": "unix://etcd-peers:0"}
        scheme, etcd_flags, registry_flags = "http", ["--log-level", "warn"], self._tls(REGISTRY)
        if self.authority:
            own = self.authority.files(REGISTRY)
            scheme = "https"
            etcd_flags += commands.etcd_tls(self.authority.files("etcd"), own.dns_name(REGISTRY))
            registry_flags += commands.etcd_client_tls(own)
        result = {
            "etcd": commands.etcd(directory / "etcd", f"{scheme}://{self.etcd}", peers, *etcd_flags),
            "registry": commands.registry([self.etcd], self.registry, *registry_flags),
            "envoy": commands.envoy(directory / "envoy.yaml"),
            "files": commands.file_server(examples.FOLDER, ports.files),
        }
        # A gate drains so that its callers can go to another gate. A gate alone has nothing to drain for.
        flags = [] if len(ports.gates) > 1 else ["--drain", "0"]
        if not self.authority:
            flags += ["--edge-key", str(directory / "envoy" / envoy.KEY_FILE)]
        if self._callers and (self._callers / envoy.CALLER_KEYS_FILE).exists():
            flags += ["--caller-keys", str(directory / "envoy" / envoy.CALLER_KEYS_FILE)]
        for number, port in enumerate(ports.gates):
            name = f"gate-{number}" if number else "gate"
            own_flags = [*flags, *self._tls(GATE), *self._cache(name)]
            result[name] = commands.gate(self.registry, f"127.0.0.1:{port}", *own_flags)
        workspace = ["--workspace", str(directory / "workspaces")]
        for each in self.serves:
            name = f"evaluator-{each.app}-{each.version}"
            flags = ["--wait", "60", "--allow-network", f"127.0.0.1:{ports.files}", *workspace, *self._cache(name)]
            own_flags = [*flags, *self._tls(f"{EVALUATOR}/{each.app}")]
            result[name] = commands.evaluator(self.registry, each.app, each.version, *own_flags)
        with_http = [name for name in result if name.partition("-")[0] in _WITH_HTTP]
        self._http = dict(zip(with_http, free_ports(len(with_http)), strict=True))
        for name, port in self._http.items():
            result[name] += ["--http", f"127.0.0.1:{port}"]
        return {name: [*command, *self._extra.get(name, [])] for name, command in result.items()}

    def _cache(self, name: str) -> list[str]:
        """Let a process that starts again do so without a registry."""
        return ["--config-cache", str(self.directory / f"{name}.json")]

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self._await("etcd and the registry")
                releases = [
                    release_of(each.app, each.version, each.path, each.custom_values, each.phase, each.desc)
                    for each in self.serves
                ]
                await publish(self.registry, *releases, tls=self.tls)
                await served(
                    self.registry, releases, lambda names: self._await(f"instances of {', '.join(names)}"), self.tls
                )
                self._await("Envoy and the gates")
                self._start("envoy")
                async with aiohttp.ClientSession() as session:
                    for each in self.serves:
                        await self._wait_answer(session, each)
        except TimeoutError:
            raise StartError(
                f"not ready within {self._start_timeout_s:g} s, waited for {self._awaited}: {self._complaint()}"
                f" (logs: {self.directory}/*.log)"
            ) from None

    def _await(self, what: str) -> None:
        self._awaited = what
        self._tell(f"Waiting for {what} ...")

    async def _wait_answer(self, session: aiohttp.ClientSession, example: Example) -> None:
        data = [{"uri": f"{self.files_url}/{image}"} for image in example.images]
        request = {"data": data if len(data) > 1 else data[0]}
        url = f"{self.url}/v1/eval/{example.app}/{example.version}"
        while True:
            try:
                async with session.post(url, json=request) as response:
                    # Callers' files may ask everybody for a certificate.
                    if response.status in (200, 401):
                        return
            except aiohttp.ClientError:
                pass
            if self._callers and (rejected := _REJECTED.search(self.log("envoy"))):
                reason = rejected[1].replace(str(self.directory / "envoy"), str(self._callers))
                raise StartError(f"--callers {self._callers}: Envoy rejects a file: {reason}")
            await asyncio.sleep(_POLL_S)

    def _complaint(self) -> str:
        """Return the last log line of each process that was started and is down, or was a moment ago."""
        down = [each for each in self._processes if each.state is not State.STOPPED and not each.is_settled]
        lines = [f"{each.name}: {_last_line(each.log_text())}" for each in down]
        return "; ".join(lines) or "every process runs, but not every release answers"


def _prometheus() -> dict[str, object]:
    """Return the config of a Prometheus that scrapes the mesh, and has its rules."""
    return {
        "global": {"scrape_interval": "5s"},
        "rule_files": [str(ROOT / "monitoring" / "rules.yaml")],
        "scrape_configs": [{"job_name": "mesh", "file_sd_configs": [{"files": [TARGETS_FILE]}]}],
    }


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it logged nothing"
