"""A release's net.py for tests, and a worker of it that tests can ask without an event loop of their own."""

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
from atserving.v1.evaluator_pb2 import Call, InferRequest, InferResponse, Reply
from atserving.v1.serving_pb2 import Resource
from evaluator.net_config import NetConfig
from evaluator.serving.supervisor import WorkerSupervisor

OBEDIENT = """
import ctypes, os, signal, sys, time
from pathlib import Path
import numpy as np
from evaluator import scripting
import beside

def net_init(cfg):
    return {"error": "", "batch_size": 4, "cfg": cfg, "pid": os.getpid()}

def net_preprocess(model, req):
    wish = (req.get("params") or {}).get("prepare")
    if wish == "wait": wait()
    if wish == "mark": Path("prepared").touch()
    if wish == "die":
        os._exit(1)
    if wish == "unpicklable":
        return {"data": lambda: None}
    if wish == "refuse":
        raise scripting.InvalidArgument("no face")
    if wish == "exit":
        sys.exit("bye")
    return {**req, "prepared": beside.Marked(os.getpid())}

def net_inference(model, args):
    rets = [answer(model, args, req) for req in args["reqs"]]
    wishes = [(req.get("params") or {}).get("rets") for req in args["reqs"]]
    if "few" in wishes: return rets[:-1]
    if "many" in wishes: return rets * 2
    if "none" in wishes: return None
    return rets

def wait():
    Path("waiting").touch()
    while not Path("go").exists():
        time.sleep(0.01)

def answer(model, args, req):
    params = req.get("params") or {}
    do = params.get("do")
    if "began" in params: Path(params["began"]).touch()
    if do == "wait": wait()
    if do in HOSTILE: HOSTILE[do]()
    if do == "slow": time.sleep(0.1)
    if do == "ret": return params["ret"]
    if do == "cfg": return {"code": 0, "message": "", "result": model["cfg"]}
    if do == "args":
        data = req["data"] if isinstance(req["data"], list) else [req["data"]]
        same = [open(each["uri"], "rb").read() == each["body"] for each in data]
        seen = [{name: value for name, value in each.items() if name != "body"} for each in data]
        result = {"same": same, "data": seen, "group": isinstance(req["data"], list), "reqid": args["reqid"],
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
    if do == "many bytes": return {"code": 0, "result_file": bytes(49 << 20)}
    if do == "loop":
        loop = []
        loop.append(loop)
        return {"code": 0, "result": loop}
    if do == "refuse": raise scripting.InvalidArgument("too dark")
    return {"code": 0, "message": "", "result": {"pid": model["pid"]}}

def fail(): raise ValueError("in /srv/secret")
def recurse(): return recurse()
def spin():
    while True: pass
def leave_a_child_behind():
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)

HOSTILE = {
    "raise": fail, "sys.exit": sys.exit, "recurse": recurse, "memory": lambda: bytearray(1 << 60),
    "os._exit": lambda: os._exit(0), "segfault": lambda: ctypes.string_at(0), "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "close": lambda: os.closerange(3, 100),
    "fork": leave_a_child_behind,
    "sleep": lambda: time.sleep(1000), "spin": spin, "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
"""
BESIDE = "class Marked:\n    def __init__(self, pid): self.pid = pid\n"
BODY = Resource(body=b"abc")

Outcome = InferResponse | ServingError


def config(workspace: Path, script: str, **fields: Any) -> NetConfig:
    folder = workspace / "release"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(script)
    (folder / "beside.py").write_text(BESIDE)
    files = {path.name: str(path) for path in folder.iterdir()}
    values = {"workspace": str(workspace), **fields.pop("custom_values", {})}
    return NetConfig.from_cfg({"tar_files": files, "custom_values": values, **fields})


class Served:
    """A worker on an event loop in a thread of its own."""

    def __init__(self, config: NetConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self.worker: WorkerSupervisor = self._call(self._new(config)).result()
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
        """Raises StartError."""

        async def start() -> None:
            await self.worker.start()
            self._running = asyncio.create_task(self.worker.run())

        self._call(start()).result()

    def close(self) -> None:
        async def close() -> None:
            if self._running:
                self._running.cancel()
                await asyncio.wait({self._running})
            await self.worker.close()

        self._call(close()).result()
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ended(self) -> BaseException | None:
        """Waits until the worker has given up; why."""

        async def ended() -> BaseException | None:
            assert self._running
            await asyncio.wait({self._running})
            return self._running.exception()

        error: BaseException | None = self._call(ended()).result()
        return error

    def ask_later(
        self, *data: Resource, timeout_s: float = 0, group: bool = False, reqid: str = "r", **params: Any
    ) -> Future[Outcome]:
        """The outcome of a request, raised or not."""
        params_json = params.pop("params_json", None) or orjson.dumps(params).decode()
        request = InferRequest(data=data or [BODY], group=group, params_json=params_json, reqid=reqid)

        async def ask() -> Outcome:
            try:
                async with asyncio.timeout(timeout_s or None):
                    reply: Reply = await self.worker.infer(Call(request=request, timeout_us=int(timeout_s * 1e6)))
                failed = reply.response.HasField("error")
                return ServingError.from_proto(reply.response.error) if failed else reply.response
            except ServingError as error:
                return error

        return self._call(ask())

    def ask(self, *data: Resource, **options: Any) -> Outcome:
        return self.ask_later(*data, **options).result()

    def together(self, *requests: dict[str, Any]) -> list[Outcome]:
        """The outcomes of one batch, which as many requests have to fill."""
        self.hold_batches()
        try:
            return [each.result() for each in [self.ask_later(**request) for request in requests]]
        finally:
            self.hold_batches(False)

    def hold_batches(self, held: bool = True) -> None:
        """From now on an engine waits for a full batch, or no longer does."""

        async def configure() -> None:
            self.worker.configure(delay_s=60 if held else 0)

        self._call(configure()).result()

    def worker_pid(self) -> int:
        """Of the process that there is now, answering or not; 0: none."""
        return self.worker.pid or 0

    def hang_up(self) -> None:
        """Closes this end of the worker's socket, as the end of this process would."""
        process = self.worker._process
        assert process
        assert process._transport
        self._loop.call_soon_threadsafe(process._transport.close)

    def pid(self) -> int:
        """Of the process that answers; that it does is asserted."""
        return int(result(self.ask())["pid"])


@contextmanager
def started(workspace: Path, script: str = OBEDIENT, **fields: Any) -> Iterator[Served]:
    served = Served(config(workspace, script, **fields))
    try:
        served.start()
        yield served
    finally:
        served.close()


def result(outcome: Outcome) -> Any:
    assert isinstance(outcome, InferResponse), outcome
    assert outcome.HasField("result_json")
    return orjson.loads(outcome.result_json)


def wait_for(condition: Callable[[], object]) -> None:
    """Returns once it holds; what is waited for is another process's to do."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
