"""Convert nets in child processes with a limit on their memory.

A server process imports the converter once and forks a child for each conversion, because the imports take longer than
most of the conversions.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType

from evaluator.caffe import ConversionError, convert

ROOT = Path(__file__).parents[2]


class LimitedConverter:
    """A client of the server process. Use it as a context manager."""

    def __enter__(self) -> LimitedConverter:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.caffe.limited"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()

    def convert(self, limit: int, paths: tuple[Path, Path], *, dynamic_size: bool = False) -> str:
        """Convert a net with at most `limit` bytes of memory beyond the interpreter and its imports.

        Returns:
            "converted", or "refused: <cause's type>: <message>".
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([limit, *map(str, paths), dynamic_size]) + "\n")
        self._server.stdin.flush()
        status, result = json.loads(self._server.stdout.readline())
        assert status == 0, result
        return str(result)


def serve() -> None:
    """Answer requests on standard input, one line of JSON each: [exit status of the child, result]."""
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _convert_and_exit(writer, *json.loads(line))
        os.close(writer)
        with open(reader) as pipe:
            result = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, result]), flush=True)


def _convert_and_exit(writer: int, limit: int, prototxt: str, caffemodel: str, dynamic_size: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    result, status = "converted", 0
    try:
        # RLIMIT_AS counts memory when it is allocated, even if the process never writes to it.
        resource.setrlimit(resource.RLIMIT_AS, (_allocated() + limit, before[1]))
        convert(prototxt, caffemodel, dynamic_size=dynamic_size)
    except ConversionError as error:
        result = f"refused: {type(error.__cause__).__name__}: {error}"
    except BaseException:
        resource.setrlimit(resource.RLIMIT_AS, before)
        result, status = traceback.format_exc(), 1
    resource.setrlimit(resource.RLIMIT_AS, before)
    os.write(writer, result.encode()[:60_000])
    os._exit(status)


def _allocated() -> int:
    """Return the size of this process's address space in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmSize")).split()[1]) * 1024


if __name__ == "__main__":
    serve()
