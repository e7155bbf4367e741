"""Real etcd members and registries on loopback ports, to be killed, frozen, wiped and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
POLL_S = 0.02
PATIENCE_S = 30.0


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


async def until(condition: Callable[[], object]) -> None:
    """Waits for what a test waits for; how long it takes is not what is tested."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is often in another process
            await asyncio.sleep(POLL_S)


async def until_async(condition: Callable[[], Awaitable[object]], *ignored: type[Exception]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if await condition():
                    return
            except ignored:
                pass
            await asyncio.sleep(POLL_S)


class Process:
    """A process that keeps its ports and its files from one start to the next."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.command = list(command)
        self.log = log
        self.environment = environment or {}
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **self.environment}
            )

    def send(self, number: int) -> None:
        assert self._popen
        self._popen.send_signal(number)

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """As kill -9 does; without effect on what isn't running."""
        if self._popen:
            self._popen.kill()
            self._popen.wait()
            self._popen = None

    async def wait(self) -> int:
        assert self._popen
        return await asyncio.to_thread(self._popen.wait)

    def logged(self) -> str:
        return self.log.read_text(errors="replace")


class Etcd(Process):
    """One member of a cluster."""

    def __init__(
        self, directory: Path, name: str, ports: dict[str, tuple[int, int]], flags: Sequence[str] = ()
    ) -> None:
        client, peer = ports[name]
        self.name = name
        self.address = f"127.0.0.1:{client}"
        self.data = directory / name
        self.flags = list(flags)
        self.scheme = "https" if "--cert-file" in flags else "http"
        self.ctl_flags: list[str] = []
        url, peer_url = f"{self.scheme}://{self.address}", f"http://127.0.0.1:{peer}"
        self._base = [
            *(str(BIN / "etcd"), "--name", name, "--data-dir", str(self.data), "--log-level", "error"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", ",".join(f"{one}=http://127.0.0.1:{ports[one][1]}" for one in ports)),
            # One member alone elects itself; several need time to hear of each other.
            *("--heartbeat-interval", "50" if len(ports) > 1 else "10"),
            *("--election-timeout", "250" if len(ports) > 1 else "50"),
            "--unsafe-no-fsync",
        ]
        super().__init__([*self._base, *self.flags], directory / f"{name}.log")

    async def ready(self) -> None:
        await until_async(lambda: asyncio.to_thread(self._healthy))

    def _healthy(self) -> bool:
        return self._run("endpoint", "health").returncode == 0

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "etcdctl"), "--endpoints", f"{self.scheme}://{self.address}", *self.ctl_flags, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ETCDCTL_API": "3"})

    def ctl(self, *arguments: str) -> str:
        """Runs etcdctl as an operator does."""
        done = self._run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wipe(self) -> None:
        """Loses the data of a member that was killed."""
        shutil.rmtree(self.data)

    def restore(self, backup: Path) -> None:
        """Puts back a backup of ``etcdctl snapshot save``, with the member killed."""
        shutil.rmtree(self.data)
        peers = self._base[self._base.index("--listen-peer-urls") + 1]
        command = [
            *(str(BIN / "etcdctl"), "snapshot", "restore", str(backup), "--data-dir", str(self.data)),
            *("--name", self.name, "--initial-cluster", f"{self.name}={peers}", "--initial-advertise-peer-urls", peers),
        ]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "ETCDCTL_API": "3"})


class Registry(Process):
    """`python -m registry`."""

    def __init__(self, directory: Path, etcd: Sequence[str], *flags: str, **environment: str) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "registry", "--etcd", ",".join(etcd), "--listen", self.address),
            *flags,
        ]
        super().__init__(command, directory / f"registry-{port}.log", environment)


def cluster(directory: Path, names: Sequence[str], *flags: str) -> list[Etcd]:
    ports = free_ports(2 * len(names))
    by_name = {name: (ports[2 * i], ports[2 * i + 1]) for i, name in enumerate(names)}
    return [Etcd(directory, name, by_name, flags) for name in names]
