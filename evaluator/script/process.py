"""One life of a script's process, as the evaluator holds it: started, called, killed."""

from __future__ import annotations

import math
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from google.protobuf.message import DecodeError

from atserving.errors import ServingError, StartError
from evaluator.contract import Config
from evaluator.script import wire


class ScriptDied(Exception):  # noqa: N818 - an event more than an error: who is to blame is the caller's to find
    """The process ended during a call, or before it. ``crowded``: not only this call may have been why."""

    def __init__(self, crowded: bool) -> None:
        super().__init__()
        self.crowded = crowded


class ScriptStuck(Exception):  # noqa: N818
    """A call was not answered in time; the process was killed for it."""


class ScriptProcess:
    """A process that runs `net.py`. Its methods may be called from any thread.

    It is dead for good once it has died, was stuck or was killed.
    """

    def __init__(self, preparing: int) -> None:
        """Starts the process, with lanes for ``preparing`` calls of ``net_preprocess`` at a time."""
        pairs = [socket.socketpair() for _ in range(1 + preparing)]
        theirs = [pair[1] for pair in pairs]
        self._inference_lane = pairs[0][0]
        self._preparing_lanes: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        for ours, _ in pairs[1:]:
            self._preparing_lanes.put(ours)
        self._lanes = [pair[0] for pair in pairs]
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "evaluator.script.host", *(str(each.fileno()) for each in theirs)],
            pass_fds=[each.fileno() for each in theirs],
            stdin=subprocess.DEVNULL,
            # What a script prints must not look like this process's own output.
            stdout=2,
            # Signals of a terminal are not for it, and what it starts can be killed with it.
            start_new_session=True,
        )
        for each in theirs:
            each.close()
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._lock = threading.Lock()
        self._calls = 0
        self._dead = self._crowded = False

    @property
    def dead(self) -> bool:
        return self._dead

    def init(self, cfg: Config, timeout_s: float) -> dict[str, Any]:
        """Loads the script and calls ``net_init``. Raises StartError."""
        try:
            return wire.to_values(self.call("init", cfg, until_s=time.monotonic() + timeout_s))
        except ServingError as error:
            raise StartError(error.message) from None
        except ScriptStuck:
            raise StartError(f"net_init did not return within {timeout_s:g} s (model_params.init_timeout_s)") from None
        except (ScriptDied, ValueError):
            raise StartError("the process of net.py ended during net_init") from None

    def call(self, name: str, *arguments: Any, until_s: float, preparing: bool = False) -> bytes:
        """Calls a method of the script's host. Raises the ServingError it failed with, ScriptDied or ScriptStuck.

        ``until_s``: of the monotonic clock; then the process is killed.
        """
        message = pickle.dumps((name, *arguments))
        with self._lane(preparing) as lane:
            try:
                wire.send(lane, message, until_s)
                self._wait(lane, until_s)
                return wire.reply(wire.receive(lane, until_s))
            except TimeoutError:
                self.kill()
                raise ScriptStuck from None
            except (OSError, EOFError, ValueError, DecodeError):
                self.kill()
                raise ScriptDied(self._crowded) from None

    @contextmanager
    def _lane(self, preparing: bool) -> Iterator[socket.socket]:
        lane = self._preparing_lanes.get() if preparing else self._inference_lane
        try:
            with self._lock:
                if self._dead:
                    raise ScriptDied(crowded=True)
                self._calls += 1
            try:
                yield lane
            finally:
                with self._lock:
                    self._calls -= 1
                    self._close_if_over()
        finally:
            if preparing:
                self._preparing_lanes.put(lane)

    def _wait(self, lane: socket.socket, until_s: float) -> None:
        """Returns once there is something to read. Raises EOFError once the process has ended, TimeoutError."""
        poll = select.poll()
        poll.register(lane, select.POLLIN)
        # A process that the script started may keep the lane open beyond the script's own end.
        poll.register(self._pidfd, select.POLLIN)
        left_s = until_s - time.monotonic()
        ready = poll.poll(None if math.isinf(left_s) else max(0, math.ceil(left_s * 1000)))
        if not ready:
            raise TimeoutError
        if all(descriptor == self._pidfd for descriptor, _ in ready):
            raise EOFError

    def kill(self) -> None:
        """Ends the process, if it has not ended, with all that it started in its group."""
        with self._lock:
            if self._dead:
                return
            self._dead, self._crowded = True, self._calls > 1
            # It is not waited for before this, so that its id can't be another's.
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
            self._close_if_over()

    def _close_if_over(self) -> None:
        if self._dead and not self._calls:
            os.close(self._pidfd)
            for lane in self._lanes:
                lane.close()
