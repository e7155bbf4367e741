"""A real etcd and a real registry, and evaluators as processes, for the tests that serve."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits"
WAIT_S = 60.0


class Process:
    """A process that logs JSON lines to standard error, which can be waited for."""

    def __init__(self, *command: str) -> None:
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self._ended = False
        self._popen = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stderr
        for line in self._popen.stderr:
            with self._grown:
                self.lines.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def logged(self, **fields: Any) -> dict[str, Any]:
        """The first logged line with those fields, waited for."""
        with self._grown:
            self._grown.wait_for(lambda: self._find(fields) or self._ended, WAIT_S)
            found = self._find(fields)
        assert found, f"{fields} was not logged:\n" + "\n".join(self.lines[-30:])
        return found

    def _find(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        for line in self.lines:
            if line.startswith("{"):
                parsed: dict[str, Any] = orjson.loads(line)
                if all(parsed.get(name) == value for name, value in fields.items()):
                    return parsed
        return None

    def terminate(self) -> None:
        self._popen.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once every line has been read."""
        status = self._popen.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return status

    def kill(self) -> None:
        self._popen.kill()
        self.wait()


@dataclass
class Registry:
    """A registry with its etcd."""

    address: str
    etcd: str

    def etcdctl(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "etcdctl"), "--endpoints", self.etcd, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT_S).stdout

    def put(self, key: str, value: dict[str, Any]) -> None:
        self.etcdctl("put", f"/ava/serving/{key}", orjson.dumps(value).decode())

    def delete(self, key: str) -> None:
        self.etcdctl("del", f"/ava/serving/{key}")

    def publish(self, app: str, version: str = "v1", **fields: Any) -> None:
        file = f"file://{DIGITS / 'digits-v1.tar'}"
        self.put(f"eval/{app}/{version}", {"name": app, "version": version, "file": file, **fields})

    def instances(self, app: str) -> list[dict[str, Any]]:
        lines = self.etcdctl("get", "--prefix", "--print-value-only", f"/ava/serving/instance/{app}/").split()
        return [orjson.loads(line) for line in lines]


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Shared by all tests; each uses an app of its own."""
    with running_registry(tmp_path_factory.mktemp("etcd")) as registry:
        yield registry


@contextmanager
def running_registry(data: Path) -> Iterator[Registry]:
    """A registry with its etcd, whose data are in a folder."""
    client, peer = free_port(), free_port()
    bin_ = Path(sys.executable).parent
    with ExitStack() as stack:
        etcd = Process(
            *(str(bin_ / "etcd"), "--data-dir", str(data), "--log-level", "warn"),
            *("--listen-client-urls", f"http://127.0.0.1:{client}"),
            *("--advertise-client-urls", f"http://127.0.0.1:{client}"),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-cluster", f"default=http://127.0.0.1:{peer}", "--unsafe-no-fsync"),
        )
        stack.callback(etcd.kill)
        registry = Process(
            *(sys.executable, "-m", "registry", "--etcd", f"127.0.0.1:{client}", "--lease-ttl", "3s"),
            *("--listen", "127.0.0.1:0"),
        )
        stack.callback(registry.kill)
        port = registry.logged(event="service starting")["port"]
        yield Registry(f"127.0.0.1:{port}", f"127.0.0.1:{client}")


@contextmanager
def evaluator(registry: Registry, app: str, version: str = "v1", *flags: str) -> Iterator[Process]:
    """An evaluator process, once it serves and is registered."""
    process = start_evaluator(registry.address, app, version, *flags)
    try:
        process.logged(event="service ready")
        yield process
    finally:
        process.kill()


def start_evaluator(registry: str, app: str, version: str = "v1", *flags: str) -> Process:
    command = ["-m", "evaluator", "--app", app, "--version", version, "--registry", registry]
    return Process(sys.executable, *command, "--listen", "127.0.0.1:0", *flags)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def digits_tar(path: Path, **members: bytes | None) -> str:
    """The digits release with some members replaced, added or, where None, left out; its URI."""
    with tarfile.open(DIGITS / "digits-v1.tar") as source, tarfile.open(path, "w") as target:
        contents: dict[str, bytes | None] = {
            info.name: file.read() for info in source if (file := source.extractfile(info))
        }
        for name, data in (contents | members).items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    return f"file://{path}"
