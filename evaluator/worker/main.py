"""The worker process, which runs a release's net: ``python -m evaluator.worker.main <socket> <progress memory>``.

Its main thread is an engine, and a script's only one. The plan may add threads to run batches or to prepare requests.
When the front closes its end of the socket, the worker kills its process group, with all children of a script.
"""

from __future__ import annotations

import faulthandler
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import cv2
import orjson
import structlog

from atserving.errors import ServingError, StartError
from atserving.telemetry import configure_logging
from atserving.v1 import evaluator_pb2
from evaluator import nets, scripting
from evaluator.net_config import DEFAULT_NET, NetConfig
from evaluator.runtime import engine
from evaluator.worker import channel, planning, request_codec, script
from evaluator.worker.batcher import Batcher, ItemResult
from evaluator.worker.net_runner import NetRunner, Prepared, Result
from evaluator.worker.plan import Plan
from evaluator.worker.progress import Progress
from evaluator.worker.schedule import Item, Schedule

log = structlog.get_logger()

_REPLY_FRAME_BYTES = 16 << 20


class Worker:
    """A loaded net that answers the front's calls."""

    def __init__(self, connection: socket.socket, progress: Progress) -> None:
        self._connection = connection
        self._progress = progress
        self._sending = threading.Lock()

    def run(self) -> None:
        """Load the net, report the outcome, and answer calls until the front closes the socket."""
        try:
            kind, payload = channel.receive(self._connection)
            assert kind == channel.Kind.START
            start = orjson.loads(payload)
        except (EOFError, OSError):
            return
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        config = NetConfig.from_cfg(start["cfg"])
        try:
            runner, plan = load(config, Plan(**start["plan"]) if start["plan"] else None)
        except StartError as error:
            self._send(channel.Kind.START, orjson.dumps({"error": str(error)}))
            return
        # The supervisor needs the longest calls to detect a stuck one.
        longest_s = [runner.longest_prepare_s, runner.longest_infer_s]
        self._send(channel.Kind.START, orjson.dumps({"plan": plan, "longest_s": longest_s}))
        self._serve(runner, plan, start["delay_s"], config)

    def _serve(self, runner: NetRunner, plan: Plan, delay_s: float, config: NetConfig) -> None:
        schedule = Schedule(batch_size=plan.batch_size, engines=plan.engines, delay_s=delay_s)
        work = NetWork(runner, _request_folder(config), config.limits.max_bytes)
        batcher = Batcher(schedule, work, self._report, self._progress, lanes=plan.lanes)
        threading.Thread(target=self._read, args=(batcher,), name="reader", daemon=True).start()
        for number in range(1, plan.engines + plan.preparers):
            threading.Thread(target=self._work, args=(batcher, number, plan), daemon=True).start()
        self._work(batcher, 0, plan)

    @staticmethod
    def _work(batcher: Batcher, number: int, plan: Plan) -> None:
        """Run one thread of the batcher; end the process if it fails, since the plan counts on every thread."""
        forwards = number < plan.engines
        try:
            batcher.run(number, forwards=forwards, prepares=plan.lanes or not forwards)
        except BaseException:
            log.exception("thread failed")
        end()

    def _watch(self) -> None:
        """End the process when the front closes the socket, also during loading, when nothing reads the socket."""
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        poll.poll()
        end()

    def _read(self, batcher: Batcher) -> None:
        """Take calls until the front closes the socket, then end the process."""
        try:
            while True:
                kind, payload = channel.receive(self._connection)
                match kind:
                    case channel.Kind.CALLS:
                        now_s = time.monotonic()
                        batcher.submit([_item(call, now_s) for call in channel.read_calls(payload)])
                    case channel.Kind.CANCELLED:
                        batcher.cancel(orjson.loads(payload))
                    case channel.Kind.SETTINGS:
                        batcher.configure(delay_s=orjson.loads(payload)["delay_s"])
        except (EOFError, OSError):
            end()
        except BaseException:
            # Out of memory, most likely. Without a reader the worker is of no use.
            log.exception("worker failed")
            end()

    def _report(self, results: Sequence[ItemResult]) -> None:
        for result in results:
            if result.item.prepared and result.item.prepared.files:
                result.item.prepared.files.remove()
        replies: list[evaluator_pb2.Reply] = []
        size = 0
        for result in results:
            if size > _REPLY_FRAME_BYTES:
                self._send_replies(replies)
                replies, size = [], 0
            replies.append(_reply(result, leads=result is results[0]))
            size += len(result.outcome.json or result.outcome.stream or "") if isinstance(result.outcome, Result) else 0
        self._send_replies(replies)

    def _send_replies(self, replies: Sequence[evaluator_pb2.Reply]) -> None:
        self._send(channel.Kind.REPLIES, evaluator_pb2.ExchangeResponse(replies=replies).SerializeToString())

    def _send(self, kind: channel.Kind, payload: bytes) -> None:
        try:
            with self._sending:
                channel.send(self._connection, kind, payload)
        except OSError:
            end()


class NetWork:
    """The work of the batcher's threads: prepares requests and runs the net."""

    def __init__(self, runner: NetRunner, folder: Path | None, max_bytes: int) -> None:
        """``folder`` holds the resources of requests as files; None if the net needs no files."""
        self._runner = runner
        self._folder = folder
        self._max_bytes = max_bytes

    def prepare(self, item: Item) -> Prepared:
        """Read and prepare a call's request. Raises a ServingError."""
        request: evaluator_pb2.InferRequest = item.request
        req = request_codec.read(request, self._max_bytes)
        if not self._folder:
            return self._runner.prepare(request.reqid, req)
        files = request_codec.Files(self._folder)
        try:
            files.write(req)
            return self._runner.prepare(request.reqid, req, files)
        except ServingError:
            files.remove()
            raise

    def infer(self, prepared: Sequence[Prepared]) -> tuple[list[Result | ServingError], float]:
        """Return the outcomes, and the seconds in the engine. Raises a ServingError if the batch as a whole failed."""
        before_s = engine.spent_s()
        return self._runner.infer(prepared), engine.spent_s() - before_s


def load(config: NetConfig, known: Plan | None) -> tuple[NetRunner, Plan]:
    """Return the warm net and its plan, which is ``known`` after a restart. Raises StartError."""
    folder = _request_folder(config)
    if not config.script:
        name = config.custom_values.fields.get("net", DEFAULT_NET)
        return planning.for_built_in(nets.built_in(name), config, known)
    assert folder, "an instance has a workspace"
    scripting.begin(config)
    load_script = script.load(config.script)
    os.chdir(folder.parent)
    folder.mkdir(exist_ok=True)
    # Files left by a crashed worker.
    for path in folder.iterdir():
        path.unlink()
    return planning.for_script(NetRunner(load_script, config), folder)


def _request_folder(config: NetConfig) -> Path | None:
    """Return the folder for the files of a script's requests; None for a built-in net, which needs none."""
    return config.workspace / "requests" if config.script and config.workspace else None


def _item(call: evaluator_pb2.Call, now_s: float) -> Item:
    expires_s = now_s + call.timeout_us / 1e6 if call.timeout_us else math.inf
    return Item(call.id, call.request, now_s, expires_s)


def _reply(result: ItemResult, leads: bool) -> evaluator_pb2.Reply:
    return evaluator_pb2.Reply(
        id=result.item.id,
        response=_response(result.outcome),
        stages=evaluator_pb2.Stages(
            decode_us=_us(result.item.prepare_s),
            queue_us=_us(result.queue_s),
            forward_us=_us(result.forward_s),
            postprocess_us=_us(result.postprocess_s),
            batch_size=result.batch_size,
            leads=leads,
        ),
    )


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _response(outcome: Any) -> evaluator_pb2.InferResponse:
    if isinstance(outcome, ServingError):
        return evaluator_pb2.InferResponse(error=outcome.to_proto())
    if outcome.stream is not None:
        return evaluator_pb2.InferResponse(stream=outcome.stream, message=outcome.message)
    return evaluator_pb2.InferResponse(result_json=(outcome.json or b"null").decode(), message=outcome.message)


def end() -> NoReturn:
    """Kill the process group: this process, and all children of a script."""
    os.killpg(0, signal.SIGKILL)
    raise SystemExit


def main() -> None:
    """Serve the socket and the progress memory whose descriptors are the arguments."""
    connection, progress = socket.socket(fileno=int(sys.argv[1])), Progress(int(sys.argv[2]))
    sys.argv = ["net.py"]
    # The terminal's Ctrl-C is for the front. It drains, and then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("evaluator")
    faulthandler.enable()
    sys.stdout = script.LogLines()
    # The worker's threads use all CPUs; threads of OpenCV would compete with them.
    cv2.setNumThreads(1)
    Worker(connection, progress).run()


if __name__ == "__main__":
    main()
