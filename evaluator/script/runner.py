"""Runs a release's `net.py` for the evaluator: a runner like that of the built-in nets, but at the end of a pipe."""

from __future__ import annotations

import math
import pickle
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from atserving.errors import DeadlineExceeded, Internal, ServingError, StartError
from evaluator import cpus
from evaluator.contract import Config, Req
from evaluator.images import sample
from evaluator.runner import Prepared, Result
from evaluator.script import wire
from evaluator.script.process import ScriptDied, ScriptProcess, ScriptStuck
from evaluator.values import Values

log = structlog.get_logger()

_INIT_TIMEOUT_S = 300.0
_LONGEST_WITHOUT_DEADLINE_S = 60.0
# A call is not stuck before it has taken so many times the longest that was answered, and at least so long: a caller
# in a hurry must not get a script killed that is only at work.
_PATIENCE, _LEAST_PATIENCE_S = 10.0, 1.0


class ScriptRunner:
    """Calls the script's functions. ``prepare`` is for many threads, ``infer`` for one at a time.

    1. The process is started by ``start``, and again by the first call after it has died.
    2. It is killed when a call is stuck: a deadline has passed (or ``model_params.script_timeout_s``), and the call has
       taken far longer than calls do. That call alone fails for it.
    3. When it dies, calls that were alone in it are to blame; where there were several, each runs again alone.
    """

    def __init__(self, cfg: Config) -> None:
        """Raises StartError where ``model_params`` are wrong. Starts nothing yet."""
        values = Values("model_params", cfg["model_params"])
        self.batch_size = 1
        self._cfg = cfg
        self._init_timeout_s = values.positive_number("init_timeout_s", _INIT_TIMEOUT_S)
        self._timeout_s = values.positive_number("script_timeout_s", math.inf)
        self._folder = Path(cfg["custom_values"]["workspace"]) / "requests"
        self._prepares = False
        self._process: ScriptProcess | None = None
        self._closed = False
        self._starting = threading.Lock()
        self._turns = _Turns()
        self._longest_s = 0.0

    def start(self) -> None:
        """Starts the script and its net. May take long; ``close`` from another thread ends it. Raises StartError."""
        self._folder.mkdir(exist_ok=True)
        self._alive()

    def close(self) -> None:
        """Ends the process for good."""
        self._closed = True
        if self._process:
            self._process.kill()

    def prepare(self, reqid: str, req: Req, deadline_s: float | None = None) -> Prepared:
        """The request after ``net_preprocess``, its resources in files meanwhile. Raises ServingError."""
        files = _Files()
        try:
            payload = pickle.dumps({**req, "data": files.write(self._folder, req["data"])})
            if self._prepares:
                payload = self._call("prepare", reqid, payload, deadlines_s=[deadline_s], preparing=True)
        except ServingError:
            files.release()
            raise
        return Prepared(reqid, {"pickled": payload, "files": files}, deadline_s, files.release)

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ServingError]:
        """One outcome a request, in order. Raises ServingError where the batch as a whole failed."""
        now_s = time.monotonic()
        late = [each.deadline_s is not None and each.deadline_s <= now_s for each in batch]
        outcomes = iter(self._infer([each for each, is_late in zip(batch, late, strict=True) if not is_late]))
        return [DeadlineExceeded("the deadline passed") if is_late else next(outcomes) for is_late in late]

    def _infer(self, batch: Sequence[Prepared]) -> Sequence[Result | ServingError]:
        if not batch:
            return []
        reqs = [(prepared.reqid, prepared.req["pickled"]) for prepared in batch]
        try:
            with ExitStack() as in_use:
                for prepared in batch:
                    in_use.enter_context(prepared.req["files"].in_use())
                outcomes = wire.to_outcomes(self._call("infer", reqs, deadlines_s=[each.deadline_s for each in batch]))
        except DecodeError:
            outcomes = []
        if len(outcomes) != len(batch):
            raise Internal("the net did not return one result a request")
        return outcomes

    def warm_up(self) -> None:
        """Runs a picture through the script, alone and as a full batch; as a group of two where it wants groups.

        A script may want more of a request than can be made up: what it refuses or fails is no more than a line in the
        log. One that dies or does not answer raises StartError.
        """
        picture = {"uri": "", "body": sample()}
        for data in ([picture], [picture, picture]):
            outcomes = [
                outcome
                for size in sorted({1, self.batch_size})
                for outcome in self._try(size, {"data": data if len(data) > 1 else data[0]})
            ]
            errors = [outcome for outcome in outcomes if isinstance(outcome, ServingError)]
            if not errors:
                return
        log.warning("the script has not answered the warm-up's picture", code=errors[0].code, reason=errors[0].message)

    def _try(self, size: int, req: Req) -> Sequence[Result | ServingError]:
        batch: list[Prepared] = []
        try:
            for _ in range(size):
                batch.append(self.prepare("warm-up", req))
            return self.infer(batch)
        except ServingError as error:
            if self._process is None or self._process.dead:
                raise StartError(f"the net failed to warm up: {error}") from error
            return [error]
        finally:
            for prepared in batch:
                prepared.release()

    def _call(self, name: str, *arguments: Any, deadlines_s: list[float | None], preparing: bool = False) -> bytes:
        call = _Call(name, arguments, deadlines_s, preparing)
        try:
            with self._turns.together():
                return self._once(call)
        except ScriptDied as death:
            if not death.crowded:
                log.error("the script's process died", call=name)
                raise Internal("the net's script died") from None
        log.warning("the script's process died, which this call may not be to blame for: once more, alone", call=name)
        try:
            with self._turns.alone():
                return self._once(call)
        except ScriptDied:
            log.error("the script's process died", call=name)
            raise Internal("the net's script died") from None

    def _once(self, call: _Call) -> bytes:
        try:
            process = self._alive()
        except StartError as error:
            log.error("the script can't be started again", reason=str(error))
            raise Internal("the net's script can't be started again") from error
        began_s = time.monotonic()
        until_s = self._until_s(began_s, call.deadlines_s)
        try:
            reply = process.call(call.name, *call.arguments, until_s=until_s, preparing=call.preparing)
        except ScriptStuck:
            log.error("the script was stuck and is killed", call=call.name, seconds=time.monotonic() - began_s)
            raise DeadlineExceeded("the net's script did not answer in time") from None
        self._longest_s = max(self._longest_s, time.monotonic() - began_s)
        return reply

    def _until_s(self, now_s: float, deadlines_s: list[float | None]) -> float:
        """When a call that begins now is stuck. Raises DeadlineExceeded where nobody waits for it any more."""
        waiting = [now_s + _LONGEST_WITHOUT_DEADLINE_S if each is None else each for each in deadlines_s]
        if max(waiting) <= now_s:
            raise DeadlineExceeded("the deadline passed")
        patience_s = max(_LEAST_PATIENCE_S, _PATIENCE * self._longest_s)
        return min(max(min(waiting), now_s + patience_s), now_s + self._timeout_s)

    def _alive(self) -> ScriptProcess:
        """The process, started if need be. Raises StartError."""
        with self._starting:
            if self._process and not self._process.dead:
                return self._process
            if self._process:
                log.info("starting the script again")
            self._process = process = ScriptProcess(cpus.available())
            if self._closed:
                process.kill()
            try:
                facts = process.init(self._cfg, self._init_timeout_s)
                self.batch_size, self._prepares = int(facts["batch_size"]), bool(facts["prepares"])
            except BaseException:
                process.kill()
                raise
            return process


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: tuple[Any, ...]
    deadlines_s: list[float | None]
    preparing: bool


class _Files:
    """The files of a request's resources: there until it is answered and no batch that it is in runs any more."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._users = 1
        self._lock = threading.Lock()
        # For a request whose caller went while it was prepared: nobody else knows of it.
        weakref.finalize(self, _remove, self._paths)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """The caller, and each use, is done with the files; the last removes them."""
        with self._lock:
            self._users -= 1
            if not self._users:
                _remove(self._paths)

    def write(self, folder: Path, data: Any) -> Any:
        """``data`` with the local paths as its ``uri``."""
        if isinstance(data, list):
            return [self.write(folder, each) for each in data]
        path = folder / secrets.token_hex(8)
        self._paths.append(path)
        try:
            path.write_bytes(data["body"])
        except OSError as error:
            log.error("a resource can't be written to the workspace", reason=error.strerror)
            raise Internal("the evaluator's workspace is full or broken") from error
        return {**data, "uri": str(path)}


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class _Turns:
    """Any number of threads together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: not self._together)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()
