"""The process that holds a release's net: ``python -m evaluator.worker.main <socket> <progress memory>``.

Its main thread is an engine, and the only one of a script; others run batches beside it, or prepare requests, as the
plan says. The evaluator's end of the socket closing ends the process, and what a script has started in its group.
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
from evaluator.limits import Limits
from evaluator.net_contract import DEFAULT_NET, SCRIPT, Config
from evaluator.runtime import engine
from evaluator.worker import channel, planning, request_codec, script
from evaluator.worker.batcher import Batcher, ItemResult
from evaluator.worker.net_runner import NetRunner, Prepared, Result
from evaluator.worker.plan import Plan
from evaluator.worker.progress import Progress
from evaluator.worker.schedule import Item, Schedule

log = structlog.get_logger()

_MANY_BYTES = 16 << 20


class Worker:
    """A loaded net, and the evaluator at the other end of the socket."""

    def __init__(self, socket_: socket.socket, progress: Progress) -> None:
        self._socket = socket_
        self._progress = progress
        self._sending = threading.Lock()

    def run(self) -> None:
        """Loads the net, says how that went, and answers calls as long as there is anybody to answer to."""
        try:
            kind, payload = channel.receive(self._socket)
            assert kind == channel.Kind.START
            start = orjson.loads(payload)
        except (EOFError, OSError):
            return
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        try:
            runner, plan = load(start["cfg"], Plan(**start["plan"]) if start["plan"] else None)
        except StartError as error:
            self._send(channel.Kind.START, orjson.dumps({"error": str(error)}))
            return
        # How long calls take, for who has to tell what is stuck.
        longest_s = [runner.longest_prepare_s, runner.longest_infer_s]
        self._send(channel.Kind.START, orjson.dumps({"plan": plan, "longest_s": longest_s}))
        self._serve(runner, plan, start["delay_s"], start["cfg"])

    def _serve(self, runner: NetRunner, plan: Plan, delay_s: float, cfg: Config) -> None:
        schedule = Schedule(batch_size=plan.batch_size, engines=plan.engines, delay_s=delay_s)
        work = NetWork(runner, _folder(cfg), Limits.of_release(cfg["custom_values"]).max_bytes)
        batcher = Batcher(schedule, work, self._answer, self._progress, lanes=plan.lanes)
        threading.Thread(target=self._read, args=(batcher,), name="reader", daemon=True).start()
        for number in range(1, plan.engines + plan.preparers):
            threading.Thread(target=self._work, args=(batcher, number, plan), daemon=True).start()
        self._work(batcher, 0, plan)

    @staticmethod
    def _work(batcher: Batcher, number: int, plan: Plan) -> None:
        """A thread's life, which is the process's: with fewer threads than planned it would only seem to be well."""
        forwards = number < plan.engines
        try:
            batcher.run(number, forwards=forwards, prepares=plan.lanes or not forwards)
        except BaseException:
            log.exception("a thread of the worker failed")
        end()

    def _watch(self) -> None:
        """Ends the process when the evaluator has gone, be it while the net is loaded, which reads nothing."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll()
        end()

    def _read(self, batcher: Batcher) -> None:
        """Takes calls in until the evaluator has gone, and then ends the process."""
        try:
            while True:
                kind, payload = channel.receive(self._socket)
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
            # Memory, mostly. Nobody would ever read here again.
            log.exception("the worker failed")
            end()

    def _answer(self, answers: Sequence[ItemResult]) -> None:
        for answer in answers:
            if answer.item.prepared and answer.item.prepared.files:
                answer.item.prepared.files.remove()
        replies: list[evaluator_pb2.Reply] = []
        size = 0
        for answer in answers:
            if size > _MANY_BYTES:
                self._send_replies(replies)
                replies, size = [], 0
            replies.append(_reply(answer, leads=answer is answers[0]))
            size += len(answer.outcome.json or answer.outcome.stream or "") if isinstance(answer.outcome, Result) else 0
        self._send_replies(replies)

    def _send_replies(self, replies: Sequence[evaluator_pb2.Reply]) -> None:
        self._send(channel.Kind.REPLIES, evaluator_pb2.ExchangeResponse(replies=replies).SerializeToString())

    def _send(self, kind: channel.Kind, payload: bytes) -> None:
        try:
            with self._sending:
                channel.send(self._socket, kind, payload)
        except OSError:
            end()


class NetWork:
    """What a batcher's threads do: the net's functions."""

    def __init__(self, runner: NetRunner, folder: Path | None, max_bytes: int) -> None:
        """``folder``: where requests' resources are files meanwhile; None where the net wants no files."""
        self._runner = runner
        self._folder = folder
        self._max_bytes = max_bytes

    def prepare(self, item: Item) -> Prepared:
        """Raises ServingError."""
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
        """The outcomes, and the seconds in the engine. Raises ServingError where the batch as a whole failed."""
        before_s = engine.spent_s()
        return self._runner.infer(prepared), engine.spent_s() - before_s


def load(cfg: Config, known: Plan | None) -> tuple[NetRunner, Plan]:
    """The net, warm, and how it is to run: as ``known`` says, where that was found out before. Raises StartError."""
    if SCRIPT in cfg["tar_files"]:
        scripting.begin(cfg)
        functions = script.load(Path(cfg["tar_files"][SCRIPT]))
        os.chdir(cfg["custom_values"]["workspace"])
        folder = _folder(cfg)
        assert folder
        folder.mkdir(exist_ok=True)
        # Of a process that died.
        for path in folder.iterdir():
            path.unlink()
        return planning.for_script(NetRunner(functions, cfg), folder)
    functions = nets.built_in(cfg["custom_values"].get("net", DEFAULT_NET))
    return planning.for_built_in(functions, cfg, known)


def _folder(cfg: Config) -> Path | None:
    """Where a script's requests have their files; None for a built-in net, which needs none."""
    return Path(cfg["custom_values"]["workspace"]) / "requests" if SCRIPT in cfg["tar_files"] else None


def _item(call: evaluator_pb2.Call, now_s: float) -> Item:
    expires_s = now_s + call.timeout_us / 1e6 if call.timeout_us else math.inf
    return Item(call.id, call.request, now_s, expires_s)


def _reply(answer: ItemResult, leads: bool) -> evaluator_pb2.Reply:
    return evaluator_pb2.Reply(
        id=answer.item.id,
        response=_response(answer.outcome),
        stages=evaluator_pb2.Stages(
            decode_us=_us(answer.item.prepare_s),
            queue_us=_us(answer.queue_s),
            forward_us=_us(answer.forward_s),
            postprocess_us=_us(answer.postprocess_s),
            batch_size=answer.batch_size,
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
    """Ends the process, along with what a script has started in its group, which is this process's own."""
    os.killpg(0, signal.SIGKILL)
    raise SystemExit


def main() -> None:
    """Serves the socket and the progress memory whose descriptors are the arguments."""
    socket_, progress = socket.socket(fileno=int(sys.argv[1])), Progress(int(sys.argv[2]))
    sys.argv = ["net.py"]
    # The terminal's Ctrl-C is for the evaluator, which ends this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("evaluator")
    faulthandler.enable()
    sys.stdout = script.LogLines()
    # The threads here are the parallelism; OpenCV's own would only compete with them.
    cv2.setNumThreads(1)
    Worker(socket_, progress).run()


if __name__ == "__main__":
    main()
