"""A net.py that runs the code of its requests, as a hostile one may, and a running evaluator of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from atserving.local import commands
from atserving.v1.evaluator_pb2 import InferRequest
from evaluator.sandbox import landlock, seccomp
from tests.evaluator.calling import DIGIT, ask, connected
from tests.evaluator.digits import digits_tar
from tests.processes import Process, Registry

SCRIPT = b"""
import ctypes, mmap, os, resource, signal, socket, subprocess, sys, time
from pathlib import Path

FRONT = os.getppid()
ARM = os.uname().machine == "aarch64"
PTRACE, READ_MEMORY, TAKE_FILE = (117, 270, 438) if ARM else (101, 310, 438)
UNSHARE, KEYS, IO_URING, WATCH = (97, 219, 425, 27) if ARM else (272, 250, 425, 254)

def net_init(cfg):
    return {"batch_size": 1, "cfg": cfg}

def call(number, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def net_inference(model, args):
    rets = []
    for req in args["reqs"]:
        scope = {**globals(), "cfg": model["cfg"], "found": None}
        try:
            exec(req["params"]["code"], scope)
            result = {"found": scope["found"]}
        except OSError as error:
            result = {"refused": error.errno}
        rets.append({"code": 0, "message": "", "result": result})
    return rets
"""


def require_sandbox() -> None:
    """Skip a test on a kernel that can't confine a script fully."""
    version = landlock.version()
    if version < 6 or not seccomp.is_available():
        pytest.skip(f"this kernel confines no script fully: Landlock {version}, it takes 6 (Linux 6.12), and seccomp")


@dataclass(frozen=True)
class Hostile:
    """A running evaluator of the script."""

    process: Process

    async def run(self, code: str, timeout_s: float = 60) -> Any:
        """Run code in the script. Return what it sets ``found`` to, or the number of its OSError as ``refused``."""
        async with connected(self.process) as connection:
            response = await ask(connection, request(code), timeout_s)
        assert not response.HasField("error"), response.error
        return orjson.loads(response.result_json)


def request(code: str) -> InferRequest:
    """Return the request that makes the script run code."""
    return InferRequest(data=[DIGIT], params_json=orjson.dumps({"code": textwrap.dedent(code)}).decode())


def publish(registry: Registry, app: str, folder: Path, script: bytes = SCRIPT, **fields: Any) -> None:
    """Publish a release of a script."""
    registry.publish(app, file=digits_tar(folder / f"{app}.tar", **{"net.py": script}), **fields)


@contextmanager
def hostile(registry: Registry, app: str, *flags: str, **environment: str) -> Iterator[Hostile]:
    """Run an evaluator of a published script."""
    process = Process(commands.evaluator(registry.address, app, "v1", *flags), environment=environment)
    process.start()
    try:
        process.logged("address", app=app)
        yield Hostile(process)
    finally:
        process.kill()
