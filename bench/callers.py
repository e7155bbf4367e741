"""Load on a server: callers over HTTP/1.1, on a connection each, or over gRPC, each with one request in flight.

    python -m bench.callers < job.json

They are in a process of their own, so that their CPU time can be told from a server's. They check every answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

from atserving.local.child import bound_to_parent
from bench.answer import Answer
from bench.measurement import quantiles_ms

_KNOWN_BODIES = 1000


@dataclass(frozen=True)
class Job:
    """What to send, and what each answer has to hold."""

    url: str
    body: bytes
    callers: int
    seconds: float
    warm_up_s: float = 0.3
    content_type: str = "application/octet-stream"
    """With an empty body the request is a GET."""
    method: str = ""
    """The path of a gRPC method, whose serialized request is the body; empty for HTTP."""
    status: int = 200
    """The status of a right answer."""
    answer: Answer | None = None
    """What a right answer says; None if its body does not matter."""

    def to_json(self) -> str:
        """Return the job for the process that does it."""
        return json.dumps(asdict(self) | {"body": base64.b64encode(self.body).decode()})

    @staticmethod
    def from_json(text: str) -> Job:
        """Return the job of ``to_json``."""
        fields = json.loads(text)
        fields["answer"] = fields["answer"] and Answer(**fields["answer"])
        return Job(**fields | {"body": base64.b64decode(fields["body"])})


@dataclass(frozen=True)
class Load:
    """What the callers saw after the warm-up. The latencies are those of right answers, 0 if there were none."""

    right: int
    refused: int
    """Answers with another status."""
    wrong: int
    """Answers with the right status that say something else."""
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def per_s(self) -> float:
        """Right answers per second."""
        return self.right / self.seconds

    @property
    def answers(self) -> int:
        return self.right + self.errors

    @property
    def errors(self) -> int:
        return self.refused + self.wrong


class Running:
    """A load in a process of its own. Use it as a context manager; ``begun`` returns after the warm-up."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __enter__(self) -> Running:
        self._process = subprocess.Popen(
            bound_to_parent([sys.executable, "-m", "bench.callers"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A terminal's ctrl-C goes to the parent only.
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def begun(self) -> None:
        """Start the callers, and wait until the warm-up is over. Raises OSError if the server can't be reached."""
        assert self._process.stdin
        self._process.stdin.write(self._job.to_json())
        self._process.stdin.close()
        self._line()

    def ended(self) -> Load:
        """Wait for the end, and return what the callers saw. Raises OSError if the server broke a connection."""
        return Load(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the load on {self._job.url} ended early")
        return line


class _Callers:
    """All callers of a job, in one event loop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        url = urlsplit(job.url)
        head = f"{'POST' if job.body else 'GET'} {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\n"
        if job.body:
            head += f"content-type: {job.content_type}\r\ncontent-length: {len(job.body)}\r\n"
        self.request = head.encode() + b"\r\n" + job.body
        self.took_s: list[float] = []
        self.refused = self.wrong = 0
        self._bodies: dict[bytes, bool] = {}
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._until_s = math.inf
        self._open = job.callers

    def begin(self) -> None:
        """Forget the warm-up. From here on every caller gets an answer at least."""
        self._until_s = time.perf_counter() + self.job.seconds
        self.took_s.clear()
        self.refused = self.wrong = 0

    def answered(self, sent_s: float, status: int, body: bytes) -> bool:
        """Take note of an answer; return whether the caller goes on."""
        now_s = time.perf_counter()
        if status != self.job.status:
            self.refused += 1
        elif self._is_right(body):
            self.took_s.append(now_s - sent_s)
        else:
            self.wrong += 1
        return now_s < self._until_s

    def _is_right(self, body: bytes) -> bool:
        if self.job.answer is None:
            return True
        # Most bodies are the same to the byte.
        right = self._bodies.get(body)
        if right is None:
            if len(self._bodies) == _KNOWN_BODIES:
                self._bodies.clear()
            right = self._bodies[body] = self.job.answer.is_in(body)
        return right

    def left(self) -> None:
        """Take note that a caller has ended."""
        self._open -= 1
        if not self._open and not self.ended.done():
            self.ended.set_result(None)

    def done(self, caller: asyncio.Task[None]) -> None:
        """Take note that a caller's task has ended."""
        error = caller.exception()
        if error:
            self.failed(error)
        else:
            self.left()

    def failed(self, error: BaseException) -> None:
        """End all."""
        if not self.ended.done():
            self.ended.set_exception(error)


class _Caller(asyncio.Protocol):
    """One connection. It sends a request once the last one is answered."""

    def __init__(self, callers: _Callers) -> None:
        self._callers = callers
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        assert self._transport
        self._sent_s = time.perf_counter()
        self._transport.write(self._callers.request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._body = self._body + data if self._body else data

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        if self._callers.answered(self._sent_s, self._parser.get_status_code(), body):
            self._send()
        else:
            self._transport, transport = None, self._transport
            if transport:
                transport.close()
            self._callers.left()

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport:
            self._callers.failed(error or OSError("the server closed a connection"))


async def _run(job: Job) -> None:
    callers = _Callers(job)
    loop = asyncio.get_running_loop()
    url = urlsplit(job.url)
    assert url.hostname and url.port, job.url  # noqa: PT018
    loop.set_exception_handler(lambda _, context: callers.failed(context.get("exception") or OSError(str(context))))
    if job.method:
        # The interpreter's import of grpc takes longer than most loads.
        from bench.grpc_callers import call

        calling = [
            loop.create_task(call(f"{url.hostname}:{url.port}", job, callers.answered)) for _ in range(job.callers)
        ]
        for task in calling:
            task.add_done_callback(callers.done)
    else:
        for _ in range(job.callers):
            await loop.create_connection(lambda: _Caller(callers), url.hostname, url.port)
    await asyncio.wait({callers.ended}, timeout=job.warm_up_s)
    callers.begin()
    print(flush=True)
    began_s = time.perf_counter()
    await callers.ended
    wall_s = time.perf_counter() - began_s
    quantiles = quantiles_ms(callers.took_s) if callers.took_s else (0.0, 0.0)
    load = Load(len(callers.took_s), callers.refused, callers.wrong, wall_s, *quantiles)
    print(json.dumps(asdict(load)), flush=True)


if __name__ == "__main__":
    uvloop.run(_run(Job.from_json(sys.stdin.read())))
