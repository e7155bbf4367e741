"""The worker process, which runs a release's net: ``python -m evaluator.worker <socket> <progress memory>``.

Its main thread is an engine, and a script's only one. The plan may add threads to run batches or to prepare requests.
When the front ends, the kernel kills the worker's process group, with all children of a script.
"""

from __future__ import annotations

import faulthandler
import math
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import cv2
import orjson
import structlog

from atserving import link, malloc, wire
from atserving.errors import ServingError, StartError
from atserving.frames import START_BYTES
from atserving.telemetry import LogSettings, apply, configure_logging
from atserving.v1 import evaluator_pb2
from evaluator import nets, scripting
from evaluator.net_config import DEFAULT_NET, NetConfig
from evaluator.runtime import engine, gpu, memory, memory_limit
from evaluator.runtime.device import Device
from evaluator.worker import channel, planning, request_codec, script
from evaluator.worker.batcher import Batcher, ItemResult
from evaluator.worker.net_runner import NetRunner, Prepared, Result
from evaluator.worker.plan import Plan
from evaluator.worker.progress import Progress
from evaluator.worker.schedule import Item, Schedule

log = structlog.get_logger()

_MAX_US = (1 << 32) - 1
_MAX_S = 4200.0


class Worker:
    """A loaded net that answers the front's calls."""

    def __init__(self, connection: socket.socket, progress: Progress) -> None:
        self._connection = connection
        self._channel = channel.Channel(connection)
        self._progress = progress
        self._sending = threading.Lock()
        self._timed = False

    def run(self) -> None:
        """Load the net, report the outcome, and answer calls until the front closes the socket."""
        try:
            frames: list[channel.Frame] = []
            while not frames:
                frames = self._channel.receive()
            assert frames[0].kind == link.START
            start = orjson.loads(frames[0].payload)
        except (EOFError, OSError):
            return
        apply(LogSettings(start["log_level"]))
        self._timed = start["timed"]
        config = NetConfig.from_cfg(start["cfg"])
        try:
            most_bytes = memory_limit.chosen_bytes(config, start["spare_bytes"])
            if config.script:
                memory_limit.bound_load(config, start["spare_bytes"])
            runner, plan = load(config, Plan(**start["plan"]) if start["plan"] else None)
        except StartError as error:
            self._send([link.frame(link.START, orjson.dumps({"error": str(error)}))])
            return
        # Conversion and planning took far more than what follows will.
        memory.give_back()
        malloc.keep_freed()
        # The supervisor needs the longest calls to detect a stuck one.
        longest_s = [runner.longest_prepare_s, runner.longest_infer_s]
        started = {"plan": plan, "longest_s": longest_s, "gpu": _gpu(config)}
        self._send([link.frame(link.START, orjson.dumps(started))])
        self._serve(runner, plan, start["delay_s"], config, most_bytes)

    def _serve(self, runner: NetRunner, plan: Plan, delay_s: float, config: NetConfig, most_bytes: float) -> None:
        schedule = Schedule(batch_size=plan.batch_size, engines=plan.engines, delay_s=delay_s)
        work = NetWork(runner, _request_folder(config), config)
        inlet = SocketInlet(self._channel) if plan.reads else None
        batcher = Batcher(schedule, work, self._report, self._progress, lanes=plan.lanes, inlet=inlet)
        if inlet:
            inlet.submit = lambda frames: self._take(frames, batcher)
        else:
            threading.Thread(target=self._read, args=(batcher,), name="reader", daemon=True).start()
        for number in range(1, plan.engines + plan.preparers):
            threading.Thread(target=self._work, args=(batcher, number, plan), daemon=True).start()
        memory_limit.bound(most_bytes, for_good=bool(config.script))
        self._work(batcher, 0, plan)

    @staticmethod
    def _work(batcher: Batcher, number: int, plan: Plan) -> None:
        """Run one thread of the batcher; end the process if it fails, since the plan counts on every thread."""
        forwards = number < plan.engines
        try:
            batcher.run(number, forwards=forwards, prepares=plan.lanes or not forwards)
        except (EOFError, OSError):
            # The front has closed the socket.
            pass
        except BaseException:
            log.exception("thread failed")
        end()

    def _read(self, batcher: Batcher) -> None:
        """Take calls until the front closes the socket, then end the process."""
        try:
            while True:
                self._take(self._channel.receive(), batcher)
        except (EOFError, OSError):
            end()
        except BaseException:
            # Without a reader the worker is of no use.
            log.exception("worker failed")
            end()

    def _take(self, frames: Sequence[channel.Frame], batcher: Batcher) -> None:
        items: list[Item] = []
        for kind, data, start, end in frames:
            if kind == link.CALL:
                try:
                    items.append(_item(link.read_call(data, start, end), time.monotonic()))
                except MemoryError:
                    self._refuse(link.read_call(data, start, min(end, start + START_BYTES)))
                continue
            # Later frames may be about these calls.
            self._submit(items, batcher)
            items = []
            if kind == link.CANCEL:
                batcher.cancel(link.read_ids(data, start, end))
            elif kind == link.SETTINGS:
                settings = orjson.loads(data[start:end])
                apply(LogSettings(settings.pop("log_level")))
                batcher.configure(**settings)
            elif kind == channel.SKIPPED:
                self._refuse(link.read_call(data, start, end))
        if items:
            self._submit(items, batcher)

    def _submit(self, items: Sequence[Item], batcher: Batcher) -> None:
        if not batcher.submit(items):
            for item in items:
                self._refuse(item.request)

    def _refuse(self, call: link.Call) -> None:
        """Answer a call for which memory was short as it arrived."""
        log.warning("memory exhausted", reqid=call.reqid.decode())
        self._report([ItemResult(Item(call.id, None, 0.0), memory_limit.exhausted())])

    def _report(self, results: Sequence[ItemResult]) -> None:
        parts: list[link.Buffer] = [_times(results)] if self._timed else []
        for result in results:
            if result.item.prepared and result.item.prepared.files:
                result.item.prepared.files.remove()
            parts += _reply(result, leads=result is results[0])
        self._send(parts)

    def _send(self, parts: Sequence[link.Buffer]) -> None:
        try:
            with self._sending:
                self._channel.send(parts)
        except OSError:
            end()


class SocketInlet:
    """The socket, as idle engines read it."""

    def __init__(self, source: channel.Channel) -> None:
        self.submit: Callable[[Sequence[channel.Frame]], None] = lambda _: None
        """Takes the frames that have arrived."""
        self._channel = source
        self._notified = os.eventfd(0, os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(source, select.POLLIN)
        self._poll.register(self._notified, select.POLLIN)

    def take(self) -> None:
        """Take all frames that have arrived. Raises EOFError and OSError if the front has closed the socket."""
        with suppress(BlockingIOError):
            self.submit(self._channel.receive(socket.MSG_DONTWAIT))
            while not self._channel.drained:
                self.submit(self._channel.receive(socket.MSG_DONTWAIT))

    def wait(self, timeout_s: float | None) -> None:
        """Wait for frames, a notification or the timeout, and take what has arrived."""
        for descriptor, _ in self._poll.poll(None if timeout_s is None else math.ceil(timeout_s * 1000)):
            if descriptor == self._notified:
                os.eventfd_read(self._notified)
            else:
                self.take()

    def notify(self) -> None:
        """End a wait, from another thread."""
        os.eventfd_write(self._notified, 1)


class NetWork:
    """The work of the batcher's threads: prepares requests and runs the net."""

    def __init__(self, runner: NetRunner, folder: Path | None, config: NetConfig) -> None:
        """``folder`` holds the resources of requests as files; None if the net needs no files."""
        self._runner = runner
        self._folder = folder
        self._limits = config.limits
        # Built-in nets take one image; a script may take groups.
        self._built_in = None if config.script else config.net
        self._lock = threading.Lock()
        self._batches = 0

    def prepare(self, item: Item) -> Prepared:
        """Read and prepare a call's request. Raises a ServingError."""
        call: link.Call = item.request
        reqid = call.reqid.decode()
        try:
            req = request_codec.read(call.request, self._limits, self._built_in)
        except MemoryError as error:
            raise memory_limit.exhausted() from error
        if not self._folder:
            return self._runner.prepare(reqid, req)
        files = request_codec.Files(self._folder)
        try:
            files.write(req)
            return self._runner.prepare(reqid, req, files)
        except ServingError:
            files.remove()
            raise

    def infer(self, prepared: Sequence[Prepared]) -> tuple[list[Result | ServingError], float]:
        """Return the outcomes, and the seconds in the engine. Raises a ServingError if the batch as a whole failed."""
        before_s = engine.spent_s()
        outcomes = self._infer_alone(prepared, self._runner.wide) if self._runner.wide else self._runner.infer(prepared)
        return outcomes, engine.spent_s() - before_s

    def _infer_alone(self, prepared: Sequence[Prepared], wide: NetRunner) -> list[Result | ServingError]:
        """Run a single request on all CPUs, unless another engine works."""
        with self._lock:
            alone = not self._batches and len(prepared) == 1
            self._batches += 1
        try:
            return (wide if alone else self._runner).infer(prepared)
        finally:
            with self._lock:
                self._batches -= 1


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


def _gpu(config: NetConfig) -> str:
    """Return the UUID of the GPU that the release names; empty for a CPU."""
    device = Device(config.use_device)
    return "" if device.is_cpu else gpu.uuid(device.index)


def _request_folder(config: NetConfig) -> Path | None:
    """Return the folder for the files of a script's requests; None for a built-in net, which needs none."""
    return config.workspace / "requests" if config.script and config.workspace else None


def _item(call: link.Call, now_s: float) -> Item:
    expires_s = now_s + call.timeout_us / 1e6 if call.timeout_us else math.inf
    return Item(call.id, call, now_s, expires_s, batched=bool(call.flags & link.BATCHED))


def _reply(result: ItemResult, leads: bool) -> tuple[bytes, bytes]:
    """Return a REPLY frame in two parts."""
    item, outcome = result.item, result.outcome
    try:
        response = _response(outcome)
    except MemoryError:
        outcome = memory_limit.exhausted()
        response = _response(outcome)
    head = link.reply_head(
        item.id,
        link.ERROR if isinstance(outcome, ServingError) else link.RESULT,
        _us(item.prepare_s),
        _us(result.queue_s),
        _us(result.forward_s),
        _us(result.postprocess_s),
        result.batch_size,
        leads,
        len(response),
    )
    return head, response


def _times(results: Sequence[ItemResult]) -> bytes:
    """Return a TIMES frame: when the batch began, whether its requests run again, and when each was prepared.

    In seconds of the monotonic clock, which the front has, too; 0: never.
    """
    first = results[0]
    began_s = first.item.arrived_s + first.item.prepare_s + first.queue_s if first.batch_size else 0.0
    prepared_s = [each.item.began_s for each in results]
    return link.frame(link.TIMES, struct.pack(f"<d?{len(results)}d", began_s, first.item.again, *prepared_s))


def _us(seconds: float) -> int:
    if 0 < seconds < _MAX_S:
        return int(seconds * 1e6)
    return _MAX_US if seconds > 0 else 0


def _response(outcome: Any) -> bytes:
    """Return a serialized ``InferResponse``."""
    if isinstance(outcome, ServingError):
        return evaluator_pb2.InferResponse(error=outcome.to_proto()).SerializeToString()
    message = evaluator_pb2.InferResponse(message=outcome.message).SerializeToString() if outcome.message else b""
    if outcome.stream is not None:
        return _field(evaluator_pb2.InferResponse.STREAM_FIELD_NUMBER, outcome.stream) + message
    # orjson's bytes are the text's UTF-8; a protobuf message would need them as text.
    return _field(evaluator_pb2.InferResponse.RESULT_JSON_FIELD_NUMBER, outcome.json or b"null") + message


def _field(number: int, value: bytes) -> bytes:
    return wire.field_head(number, len(value)) + value


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
