"""Decode each image in its own process, with limited memory and measured CPU time.

Run as a program, this module is the server: it imports the decoder once, and forks for each image.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from atserving.errors import InvalidArgument
from evaluator.images import decode
from evaluator.limits import Limits

ROOT = Path(__file__).resolve().parents[3]
LIMITS = Limits()
# The address space that one image may add to a process after the import of the decoder.
MEMORY_BYTES = 512 << 20
# Ends a decoder that never returns; far above the limit of any test.
_MAX_CPU_S = 100
_TRIES = 2


class MeasuredDecoder:
    """The client. ``decode`` compares an image's CPU time with that of an ordinary image of the largest size.

    Both are CPU times of the same machine in the same minutes, so a slow or busy machine raises both.
    """

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self._server = server
        self._ordinary_s = 0.0

    def decode(self, data: bytes, *, max_ratio: float = 4) -> str:
        """Return the shape of the image's pixels, or the error message for a refused image.

        Asserts that the CPU time is at most ``max_ratio`` times an ordinary image's, in one of two tries.
        """
        assert len(data) <= LIMITS.max_bytes
        tries = []
        for _ in range(_TRIES):
            self._ordinary_s = self._ordinary_s or self._measure(_largest_ordinary_image())[1]
            answer, cpu_s = self._measure(data)
            if cpu_s <= max_ratio * self._ordinary_s:
                return answer
            tries.append((cpu_s, self._ordinary_s))
            self._ordinary_s = 0.0
        raise AssertionError(f"over {max_ratio} times an ordinary image's CPU time: {tries} (seconds)")

    def _measure(self, data: bytes) -> tuple[str, float]:
        assert self._server.stdin
        assert self._server.stdout
        try:
            self._server.stdin.write(len(data).to_bytes(8, "big") + data)
            self._server.stdin.flush()
            reply = json.loads(self._server.stdout.readline())
        except BaseException:
            # The next test must not read this image's reply.
            self._server.kill()
            raise
        assert reply["exit_code"] == 0, reply
        return reply["answer"], reply["cpu_s"]


@functools.cache
def _largest_ordinary_image() -> bytes:
    return cv2.imencode(".png", np.zeros((LIMITS.max_height, LIMITS.max_width, 3), np.uint8))[1].tobytes()


@contextmanager
def started() -> Iterator[MeasuredDecoder]:
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        # The end of the block closes the server's input, and the server stops.
        yield MeasuredDecoder(server)


def _serve() -> None:
    cv2.setNumThreads(1)
    while size := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(size, "big"))
        print(json.dumps(_decode_in_fork(data)), flush=True)


def _decode_in_fork(data: bytes) -> dict[str, object]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        exit_code = 1
        try:
            os.write(writer, _decode_limited(data).encode())
            exit_code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(exit_code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read().decode()
    _, status, used = os.wait4(pid, 0)
    return {
        "answer": answer,
        "exit_code": os.waitstatus_to_exitcode(status),
        "cpu_s": used.ru_utime + used.ru_stime,
    }


def _decode_limited(data: bytes) -> str:
    with open("/proc/self/statm") as statm:
        used_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S))
    try:
        return str(decode(data, LIMITS).shape)
    except InvalidArgument as error:
        return str(error)


if __name__ == "__main__":
    _serve()
