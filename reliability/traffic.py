"""Callers of a mesh, in a process of their own, that check every answer.

    python -m reliability.traffic

The job comes as a line on standard input, and the callers stop when a second line or its end comes. A caller sends
requests at a steady rate, whatever becomes of the earlier ones, and uses every Envoy in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import uvloop

from atserving.local.child import bound_to_parent
from reliability.truth import Truth

CALLERS = "callers"
"""The group of callers who may lose nothing."""
PATIENCE_S = 40.0
"""How long a caller waits. The mesh itself answers after 30 s at the latest."""
_MOST_IN_FLIGHT = 4000


@dataclass(frozen=True)
class Stream:
    """Requests of one kind at a steady rate."""

    kind: str
    """A method of :class:`reliability.requests.Requests`."""
    per_s: float
    app: str = "digits"
    version: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    group: str = CALLERS
    """Callers of other groups are counted apart from ``callers``."""
    timeout_s: float = PATIENCE_S


@dataclass(frozen=True)
class Job:
    """The requests to send, and where."""

    edges: Sequence[str]
    files_url: str
    truth: Truth
    streams: Sequence[Stream]


@dataclass(frozen=True)
class Outcome:
    """How the requests of a group ended at one Envoy. An empty cause is a right answer."""

    group: str
    edge: int
    cause: str
    took_s: Sequence[float]


class Traffic:
    """The callers. An async context manager: entering starts them; ``ended`` stops them and waits for their answers."""

    def __init__(self, job: Job) -> None:
        self._job = job

    async def __aenter__(self) -> Traffic:
        self._process = await asyncio.create_subprocess_exec(
            *bound_to_parent([sys.executable, "-m", "reliability.traffic"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=64 << 20,
            # A terminal's ctrl-C goes to the parent only.
            start_new_session=True,
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(self._job)).encode() + b"\n")
        await self._line()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def ended(self) -> list[Outcome]:
        """Stop sending, wait for the last answers, and return what became of each request. Raises OSError."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        return [Outcome(**each) for each in json.loads(await self._line())]

    async def _line(self) -> bytes:
        assert self._process.stdout
        line = await self._process.stdout.readline()
        if not line:
            raise OSError("the callers ended early")
        return line


async def _run(job: Job) -> None:
    from reliability.requests import Requests

    ended: dict[tuple[str, int, str], list[float]] = {}
    in_flight: set[asyncio.Task[None]] = set()
    skipped: Counter[str] = Counter()

    async def send(requests: Requests, stream: Stream, edge: int) -> None:
        began_s = time.perf_counter()
        cause = await requests.send(stream, edge)
        took_s = round(time.perf_counter() - began_s, 4)
        ended.setdefault((stream.group, edge, cause), []).append(took_s)

    async def keep_sending(requests: Requests, stream: Stream, edges: itertools.cycle[int]) -> None:
        next_s = time.perf_counter() + random.random() / stream.per_s
        while True:
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            next_s += 1 / stream.per_s
            if len(in_flight) >= _MOST_IN_FLIGHT:
                skipped[stream.group] += 1
                continue
            task = asyncio.create_task(send(requests, stream, next(edges)))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)

    async with Requests(job.edges, job.files_url, job.truth) as requests:
        sending = [
            asyncio.create_task(keep_sending(requests, stream, itertools.cycle(range(len(job.edges)))))
            for stream in job.streams
        ]
        print(flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for task in sending:
            task.cancel()
        await asyncio.wait(sending)
        if in_flight:
            await asyncio.wait(set(in_flight))
    for group, count in skipped.items():
        ended[group, 0, f"not sent, as {_MOST_IN_FLIGHT} were in flight"] = [0.0] * count
    print(json.dumps([asdict(Outcome(*key, took_s)) for key, took_s in ended.items()]), flush=True)


def _read_job(line: str) -> Job:
    fields = json.loads(line)
    return Job(**fields | {"streams": [Stream(**each) for each in fields["streams"]]})


if __name__ == "__main__":
    uvloop.run(_run(_read_job(sys.stdin.readline())))
