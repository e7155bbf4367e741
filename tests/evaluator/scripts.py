"""A net.py whose behaviour each request chooses, and a supervisor of its worker for tests without an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from atserving.errors import ServingError
from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.net_config import NetConfig
from evaluator.serving.supervisor import WorkerSupervisor

SCRIPT_BY_PARAMS = """
import ctypes, os, signal, sys, time
from pathlib import Path
import numpy as np
from evaluator import scripting
import identity

def net_init(cfg):
    return {"error": "", "batch_size": 4, "cfg": cfg, "pid": os.getpid()}

def net_preprocess(model, req):
    action = (req.get("params") or {}).get("prepare")
    if action == "wait": wait()
    if action == "mark": Path("prepared").touch()
    if action == "crash": os._exit(1)
    if action == "refuse": raise scripting.InvalidArgument("no face")
    if action == "exit": sys.exit("bye")
    return {**req, "prepared": identity.PreparedIn(os.getpid())}

def net_inference(model, args):
    rets = [ret_of(model, args, req) for req in args["reqs"]]
    numbers = [(req.get("params") or {}).get("rets") for req in args["reqs"]]
    if "few" in numbers: return rets[:-1]
    if "many" in numbers: return rets * 2
    if "none" in numbers: return None
    return rets

def wait():
    Path("waiting").touch()
    while not Path("go").exists():
        time.sleep(0.01)

def ret_of(model, args, req):
    params = req.get("params") or {}
    do = params.get("do")
    if "began" in params: Path(params["began"]).touch()
    if do == "wait": wait()
    if do in HOSTILE: HOSTILE[do]()
    if do == "ret": return params["ret"]
    if do == "cfg": return {"code": 0, "message": "", "result": model["cfg"]}
    if do == "args":
        data = req["data"] if isinstance(req["data"], list) else [req["data"]]
        same = [open(each["uri"], "rb").read() == each["body"] for each in data]
        fields = [{name: value for name, value in each.items() if name != "body"} for each in data]
        result = {"same": same, "data": fields, "group": isinstance(req["data"], list), "reqid": args["reqid"],
                  "count": len(args["reqs"]), "params": params, "prepared": req["prepared"].pid == os.getpid()}
        return {"code": 0, "message": "hi", "result": result}
    if do == "numbers":
        return {"code": 0, "result": {"x": np.float32(1.5), "y": np.arange(3)}}
    if do == "print":
        print("printed by", "the script", file=sys.stdout)
        os.write(1, b"written below python\\n")
    if do == "file":
        Path("result.bin").write_bytes(bytes(range(256)))
        return {"code": 0, "message": "m", "result_file": params.get("as", "result.bin")}
    if do == "bytes": return {"code": 0, "message": "m", "result_file": b"\\x00\\xff"}
    if do == "link":
        if not os.path.islink("link"): os.symlink("/etc/passwd", "link")
        return {"code": 0, "result_file": "link"}
    if do == "nan": return {"code": 0, "result": {"x": float("nan")}}
    if do == "object": return {"code": 0, "result": object()}
    if do == "surrogate": return {"code": 400, "message": "\\ud800 odd"}
    if do == "wait, many bytes":
        wait()
        return {"code": 0, "result_file": bytes(10 << 20)}
    if do == "many bytes": return {"code": 0, "result_file": bytes(49 << 20)}
    if do == "loop":
        loop = []
        loop.append(loop)
        return {"code": 0, "result": loop}
    if do == "refuse": raise scripting.InvalidArgument("too dark")
    return {"code": 0, "message": "", "result": {"pid": model["pid"]}}

def raise_error(): raise ValueError("in /srv/secret")
def recurse(): return recurse()
def spin():
    while True: pass
def leave_a_child_process():
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)

HOSTILE = {
    "raise": raise_error, "sys.exit": sys.exit, "recurse": recurse,
    "os._exit": lambda: os._exit(0), "segfault": lambda: ctypes.string_at(0), "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "close": lambda: os.closerange(3, 100),
    "fork": leave_a_child_process,
    "sleep": lambda: time.sleep(1000), "spin": spin, "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
"""
IDENTITY = "class PreparedIn:\n    def __init__(self, pid): self.pid = pid\n"
BODY = Resource(body=b"abc")

Outcome = InferResponse | ServingError


def config(workspace: Path, script: str, **fields: Any) -> NetConfig:
    """Write a release with a script, and return its config."""
    folder = workspace / "release"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(script)
    (folder / "identity.py").write_text(IDENTITY)
    files = {path.name: str(path) for path in folder.iterdir()}
    values = {"workspace": str(workspace), **fields.pop("custom_values", {})}
    return NetConfig.from_cfg({"tar_files": files, "custom_values": values, **fields})


class BlockingSupervisor:
    """A supervisor on an event loop in a thread of its own, so that tests can block."""

    def __init__(self, config: NetConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self.supervisor: WorkerSupervisor = self._call(self._new(config)).result()
        except BaseException:
            self._stop()
            raise
        self._running: asyncio.Task[None] | None = None

    @staticmethod
    async def _new(config: NetConfig) -> WorkerSupervisor:
        return WorkerSupervisor(config)

    def _call(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def start(self) -> None:
        """Start the worker. Raises StartError."""

        async def start() -> None:
            await self.supervisor.start()
            self._running = asyncio.create_task(self.supervisor.run())

        self._call(start()).result()

    def close(self) -> None:
        async def close() -> None:
            if self._running:
                self._running.cancel()
                await asyncio.wait({self._running})
            await self.supervisor.close()

        self._call(close()).result()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run_error(self) -> BaseException | None:
        """Wait until the supervisor ends by itself, and return its exception."""

        async def run_error() -> BaseException | None:
            assert self._running
            await asyncio.wait({self._running})
            return self._running.exception()

        error: BaseException | None = self._call(run_error()).result()
        return error

    def ask_later(
        self, *data: Resource, timeout_s: float = 0, group: bool = False, reqid: str = "r", **params: Any
    ) -> Future[Outcome]:
        """Send a request. The future has its response, or the error that it failed with."""
        params_json = params.pop("params_json", None) or orjson.dumps(params).decode()
        request = InferRequest(data=data or [BODY], group=group, params_json=params_json, reqid=reqid)

        async def ask() -> Outcome:
            try:
                async with asyncio.timeout(timeout_s or None):
                    reply = await self.supervisor.infer(request, timeout_s)
                response = InferResponse.FromString(bytes(reply.response))
                return ServingError.from_proto(response.error) if response.HasField("error") else response
            except ServingError as error:
                return error

        return self._call(ask())

    def ask(self, *data: Resource, **options: Any) -> Outcome:
        """Send a request, and wait for its outcome. Raises TimeoutError."""
        return self.ask_later(*data, **options).result()

    def ask_in_one_batch(self, *requests: dict[str, Any]) -> list[Outcome]:
        """Send requests that fill one batch, and return their outcomes."""
        self.hold_batches()
        try:
            return [each.result() for each in [self.ask_later(**request) for request in requests]]
        finally:
            self.hold_batches(False)

    def hold_batches(self, hold: bool = True) -> None:
        """Let engines wait for a full batch from now on, or no longer."""

        async def configure() -> None:
            self.supervisor.configure(delay_s=60 if hold else 0)

        self._call(configure()).result()

    def set_app_timeout(self, timeout_s: float) -> None:
        """Set how long a call may run, whatever its caller's deadline is."""

        async def configure() -> None:
            self.supervisor.configure(delay_s=0, timeout_s=timeout_s)

        self._call(configure()).result()

    def has_sent(self) -> bool:
        """Return whether the worker has all calls that it may have now."""

        async def has_sent() -> bool:
            process = self.supervisor._process
            return bool(process and process.writable and not process.unsent_bytes and not self.supervisor._flushing)

        return bool(self._call(has_sent()).result())

    def worker_pid(self) -> int:
        """Return the id of the current process, which may not reply; 0 without a process."""
        return self.supervisor.pid or 0

    def close_socket(self) -> None:
        """Close the supervisor's end of the socket, as the end of its process would."""
        process = self.supervisor._process
        assert process
        assert process.transport
        self._loop.call_soon_threadsafe(process.transport.close)

    def pid(self) -> int:
        """Send a request, and return the id of the process that replied."""
        return int(result(self.ask())["pid"])


@contextmanager
def started(workspace: Path, script: str = SCRIPT_BY_PARAMS, **fields: Any) -> Iterator[BlockingSupervisor]:
    """Run a worker of a script; ``fields`` are of the release's config."""
    worker = BlockingSupervisor(config(workspace, script, **fields))
    try:
        worker.start()
        yield worker
    finally:
        worker.close()


def result(outcome: Outcome) -> Any:
    assert isinstance(outcome, InferResponse), outcome
    assert outcome.HasField("result_json")
    return orjson.loads(outcome.result_json)


def wait_for(condition: Callable[[], object]) -> None:
    """Block until a condition holds, for example in another process."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
