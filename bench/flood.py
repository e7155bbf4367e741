"""Measure what a flood of requests for one app costs a lone caller of another, at a gate.

    python -m bench.flood [--seconds 2]

Both have their requests on one connection to the gate, as they have behind an Envoy, and the flood sends its next
request once one is answered or refused. The gate has a CPU of its own, and all others share the next one, so that this
is what waiting in the gate costs, and not what a busy machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace
from functools import partial

from google.api import httpbody_pb2

from atserving.errors import StartError
from atserving.local import proc
from atserving.local.examples import DIGITS, FOLDER
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh
from atserving.v1 import edge_pb2
from bench.measurement import markdown_table, milliseconds, quantiles_ms
from reliability import frames

_PICTURE = FOLDER / "digits" / "images" / "7.png"
_FLOODS = (0, 64, 256, 1024)
_WARM_UP_S = 0.5
_HEADERS = frames.http2_headers("/atserving.v1.EdgeService/Eval", "application/grpc")
_END_HEADERS, _END_STREAM, _ACK = 4, 1, 1
_INITIAL_WINDOW_SIZE = 4
_LARGE = (1 << 31) - 1


class Callers(asyncio.Protocol):
    """A lone caller of app ``b``, and a flood of ``a``."""

    def __init__(self, flood: int) -> None:
        body = httpbody_pb2.HttpBody(content_type="application/octet-stream", data=_PICTURE.read_bytes())
        self._messages = {app: edge_pb2.EdgeEvalRequest(app=app, body=body).SerializeToString() for app in ("a", "b")}
        self._flood = flood
        self._stream = -1
        self._unread = b""
        self._sent_s = 0.0
        self._alone = 0
        self._passed = 0
        self.wrong = 0
        """How many requests of the lone caller had no result."""
        self.answers = 0
        """How many requests of the flood were answered or refused."""
        self.took_s: list[float] = []
        self.passed: list[int] = []
        """How many of the flood were answered while the lone caller waited, for each of its requests."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        windows = frames.frame(frames.SETTINGS, 0, 0, _INITIAL_WINDOW_SIZE.to_bytes(2) + _LARGE.to_bytes(4))
        windows += frames.frame(frames.WINDOW_UPDATE, 0, 0, (_LARGE - 65535).to_bytes(4))
        requests = b"".join(self._request("a") for _ in range(self._flood))
        transport.write(frames.PREFACE + windows + requests + self._request("b"))

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        at, sent = 0, []
        while len(data) - at >= 9:
            length = int.from_bytes(data[at : at + 3])
            if len(data) - at < 9 + length:
                break
            kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9])
            if kind in (frames.DATA, frames.HEADERS) and flags & _END_STREAM:
                sent.append(self._answered(stream, data[at + 9 : at + 9 + length]))
            elif kind in (frames.SETTINGS, frames.PING) and not flags & _ACK:
                payload = data[at + 9 : at + 9 + length] if kind == frames.PING else b""
                sent.append(frames.frame(kind, _ACK, 0, payload))
            at += 9 + length
        self._unread = data[at:]
        self._transport.write(b"".join(sent))

    def _answered(self, stream: int, end: bytes) -> bytes:
        """Take note of an answer, and return the next request."""
        if stream != self._alone:
            self.answers += 1
            return self._request("a")
        self.wrong += b'"code":0' not in end
        self.took_s.append(asyncio.get_running_loop().time() - self._sent_s)
        self.passed.append(self.answers - self._passed)
        return self._request("b")

    def _request(self, app: str) -> bytes:
        self._stream += 2
        if app == "b":
            self._alone, self._passed = self._stream, self.answers
            self._sent_s = asyncio.get_running_loop().time()
        message = self._messages[app]
        data = b"\0" + len(message).to_bytes(4) + message
        head = frames.frame(frames.HEADERS, _END_HEADERS, self._stream, _HEADERS)
        return head + frames.frame(frames.DATA, _END_STREAM, self._stream, data)


def _pin(mesh: Mesh) -> None:
    """Give the gate a CPU of its own, and let the flooded app's evaluator come last on the other."""
    gate, others = sorted(os.sched_getaffinity(0))[:2]
    for name, pid in {**mesh.pids(), "callers": os.getpid()}.items():
        for each in (pid, *(child.pid for child in proc.descendants(pid) if name != "callers")):
            for thread in os.listdir(f"/proc/{each}/task"):
                os.sched_setaffinity(int(thread), {gate if name == "gate" else others})
                if name == "evaluator-a-v1":
                    os.setpriority(os.PRIO_PROCESS, int(thread), 10)


async def run(seconds: float) -> None:
    """Measure a flood of each size, and print a table. Raises StartError."""
    rows = []
    async with Mesh(serves=[replace(DIGITS[0], app=app) for app in ("a", "b")]) as mesh:
        _pin(mesh)
        for flood in _FLOODS:
            loop = asyncio.get_running_loop()
            port = mesh.ports.gates[0]
            transport, callers = await loop.create_connection(partial(Callers, flood), "127.0.0.1", port)
            await asyncio.sleep(_WARM_UP_S)
            callers.took_s.clear()
            callers.passed.clear()
            before = callers.answers
            await asyncio.sleep(seconds)
            if callers.wrong or not callers.took_s:
                raise StartError(f"the lone caller got no right answers in {seconds:g} s beside a flood of {flood}")
            p50_ms, p99_ms = quantiles_ms(callers.took_s)
            rate = (callers.answers - before) / seconds
            passed = sorted(callers.passed)[len(callers.passed) // 2]
            rows.append((str(flood), milliseconds(p50_ms), milliseconds(p99_ms), f"{passed:,}", f"{rate:,.0f}"))
            transport.abort()
    print(markdown_table(("requests of the flood at once", "p50", "p99", "passed by", "the flood's answers/s"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each row takes (default: 2)")
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this needs two CPUs")
    try:
        run_until_stopped(run(parser.parse_args().seconds))
    except (StartError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
