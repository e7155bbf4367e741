"""The process that a release's `net.py` runs in: ``python -m evaluator.script.host <file descriptor>...``.

Each descriptor is a lane: a socket on which calls come one by one. The first is the main thread's, for ``net_init`` and
``net_inference``; the others, each with a thread, are for ``net_preprocess``. The evaluator's end of any lane closing
ends the process.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import cv2
import structlog

from atserving.errors import Internal, ServingError, StartError
from atserving.telemetry import configure_logging
from evaluator import scripting
from evaluator.contract import NetFunctions
from evaluator.runner import Prepared, Runner
from evaluator.script import wire

log = structlog.get_logger()

_LONGEST_LINE = 2000


class Host:
    """The script, once it is loaded, and the calls that the evaluator makes of it."""

    def __init__(self) -> None:
        self._runner: Runner | None = None

    def init(self, cfg: dict[str, Any]) -> bytes:
        """Loads the script and its net; what to know of it. Raises StartError."""
        scripting.begin(cfg)
        functions = load(Path(cfg["tar_files"]["net.py"]))
        os.chdir(cfg["custom_values"]["workspace"])
        self._runner = Runner(functions, cfg)
        return wire.from_values(batch_size=self._runner.batch_size, prepares=functions.net_preprocess is not None)

    def prepare(self, reqid: str, req: bytes) -> bytes:
        """A pickled req after ``net_preprocess``, pickled."""
        assert self._runner
        prepared = self._runner.prepare(reqid, pickle.loads(req)).req  # noqa: S301 - the evaluator's, or our own
        try:
            return pickle.dumps(prepared)
        except Exception as error:
            log.error("what net_preprocess returned can't be pickled", reqid=reqid, reason=str(error))
            raise Internal("the net failed to prepare the request") from error

    def infer(self, batch: list[tuple[str, bytes]]) -> bytes:
        """The outcomes of a batch of pickled reqs."""
        assert self._runner
        loaded = [Prepared(reqid, pickle.loads(req)) for reqid, req in batch]  # noqa: S301 - as above
        return wire.from_outcomes(self._runner.infer(loaded))

    def serve(self, lane: socket.socket) -> NoReturn:
        """Answers the calls of a lane until the evaluator has gone, and then ends the process."""
        while True:
            try:
                name, *arguments = pickle.loads(wire.receive(lane))  # noqa: S301 - the evaluator's
                wire.send(lane, self._answer(getattr(self, name), arguments))
            except (EOFError, OSError):
                # Along with what the script may have started: the group is this process's own.
                os.killpg(0, signal.SIGKILL)

    def _answer(self, method: Callable[..., bytes], arguments: list[Any]) -> bytes:
        try:
            return wire.done(method(*arguments))
        except ServingError as error:
            return wire.failed(error)
        except StartError as error:
            return wire.failed(Internal(str(error)))
        except Exception:
            # Memory, mostly; what the script itself raises, the runner has caught.
            log.exception("a call of the script failed")
            return wire.failed(Internal("the net's script failed"))


def load(path: Path) -> NetFunctions:
    """The functions of a `net.py`, whose neighbours it may import. Raises StartError."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("net", path)
    assert spec
    assert spec.loader
    module = sys.modules["net"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise StartError(f"{Path(error.filename or 'net.py').name}, line {error.lineno}: {error.msg}") from error
    except BaseException as error:
        log.exception("net.py failed")
        raise StartError(f"net.py raised {type(error).__name__} while it was loaded, see the log") from error
    functions = {name: getattr(module, name, None) for name in ("net_init", "net_inference", "net_preprocess")}
    for name, function in functions.items():
        if not callable(function) and (function is not None or name != "net_preprocess"):
            raise StartError(f"net.py has no function {name}")
    return NetFunctions(**{name: _guarded(function) for name, function in functions.items() if function})


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an error of what would end the thread: ``sys.exit`` in a script is no more than a failed call."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:
            raise
        except BaseException as stop:
            raise RuntimeError(f"the script raised {type(stop).__name__}") from stop

    return call


class LogLines(io.TextIOBase):
    """Standard output for a script: each line that it prints is one in the log."""

    def __init__(self) -> None:
        self._part = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._part, "text", "") + text).split("\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], ""
        self._part.text = rest
        for line in lines:
            log.info("script", text=line[:_LONGEST_LINE])
        return len(text)


def main() -> None:
    """Serves the lanes whose descriptors are the arguments."""
    lanes = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
    sys.argv = ["net.py"]
    # The terminal's Ctrl-C is for the evaluator, which ends this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("evaluator")
    sys.stdout = LogLines()
    cv2.setNumThreads(1)
    host = Host()
    for lane in lanes[1:]:
        threading.Thread(target=host.serve, args=(lane,), daemon=True).start()
    host.serve(lanes[0])


if __name__ == "__main__":
    main()
