"""Calls for which a worker has no memory as they arrive fail alone, and the worker goes on."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atserving.errors import InvalidArgument, Unavailable
from atserving.v1.evaluator_pb2 import InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.net_config import NetConfig
from tests.evaluator.digits import DIGITS
from tests.evaluator.scripts import BlockingSupervisor, Outcome, started, wait_for

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
MESSAGE = "the instance has too little memory left for this request"
# A worker has 64 MiB for its requests, or more.
BOUND = {"memory_mib": 1}
READER = {"engines": 1, "intra_op_threads": 2}
INLET = {"intra_op_threads": 1}


@contextmanager
def built_in(workspace: Path, **model_params: int) -> Iterator[BlockingSupervisor]:
    """Run a worker of the digits."""
    with tarfile.open(DIGITS / "digits-v1.tar") as tar:
        tar.extractall(workspace / "release", filter="data")
    files = {path.name: str(path) for path in (workspace / "release").iterdir()}
    values = {"workspace": str(workspace), "net": "classify"}
    worker = BlockingSupervisor(
        NetConfig.from_cfg({"tar_files": files, "custom_values": values, "model_params": model_params})
    )
    try:
        worker.start()
        yield worker
    finally:
        worker.close()


@pytest.fixture(params=["a script", "a reader", "an inlet"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockingSupervisor]:
    workspace = tmp_path.resolve()
    if request.param == "a script":
        with started(workspace, model_params=BOUND) as running:
            yield running
        return
    inlet = request.param == "an inlet"
    with built_in(workspace, **BOUND, **(INLET if inlet else READER)) as running:
        assert running.supervisor.plan.reads == inlet
        yield running


def is_refused(outcome: Outcome) -> bool:
    return isinstance(outcome, Unavailable) and (outcome.status, outcome.message) == (503, MESSAGE)


@pytest.mark.parametrize("size", [15 * MIB, 100 * MIB])
def test_calls_beyond_the_memory_fail_alone(worker: BlockingSupervisor, size: int) -> None:
    pid = worker.worker_pid()
    small = Resource(body=(DIGITS / "images" / "7.png").read_bytes())
    large = Resource(body=bytes(size))
    asked = [(each, worker.ask_later(each)) for _ in range(3) for each in (small, large, large, small)]
    outcomes = [(each is large, answer.result()) for each, answer in asked]
    assert all(isinstance(outcome, InferResponse) for is_large, outcome in outcomes if not is_large), outcomes
    if size > 64 * MIB:
        assert all(is_refused(outcome) for is_large, outcome in outcomes if is_large), outcomes
    assert isinstance(worker.ask(small), InferResponse)
    assert worker.worker_pid() == pid


def anonymous_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def test_a_busy_worker_gets_no_more_bytes_than_its_threads_can_use(tmp_path: Path) -> None:
    workspace = tmp_path.resolve()
    with started(workspace) as worker:
        supervisor = worker.supervisor
        plan = supervisor.plan
        busy = [worker.ask_later(prepare="wait") for _ in range(plan.preparers)]
        wait_for(lambda: len(supervisor._progress.running()) == len(busy))
        before_mib = anonymous_mib(worker.worker_pid())
        large = [worker.ask_later(Resource(body=bytes(24 * MIB))) for _ in range(2 * plan.batch_size)]
        wait_for(lambda: supervisor.queued == len(large) and worker.has_sent())
        grown_mib = anonymous_mib(worker.worker_pid()) - before_mib
        (workspace / "go").touch()
        assert all(isinstance(each.result(), InferResponse) for each in busy)
        assert all(isinstance(each.result(), InvalidArgument) for each in large), "they are over max_bytes"
        assert grown_mib < 16 * (plan.engines + plan.preparers) + 24 + 16


SHORT = """
import socket
import numpy as np
from atserving import link, malloc
from evaluator.runtime import memory_limit
from evaluator.worker.batcher import Batcher
from evaluator.worker.channel import Frame
from evaluator.worker.main import Worker
from evaluator.worker.schedule import Schedule

ours, theirs = socket.socketpair()
for each in (ours, theirs):
    each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
worker = Worker(theirs, None)
batcher = Batcher(Schedule(batch_size=4, engines=1), None, worker._report, None, lanes=True)

def call(id, size):
    return link.call_head(id, 0, 0, b"r", b"", size) + bytes(size)

ours.sendall(b"".join([call(id, 1000) for id in range(1, 200)] + [call(200, 1 << 20), call(201, 1000)]))
arrived = call(202, 200_000)
malloc.keep_freed()
memory_limit.bound(1)
filler = []
try:
    while True:
        filler.append(np.ones(64 << 10, np.uint8))
except MemoryError:
    pass
# Holes in which short calls find place, and long ones don't.
del filler[-32::2]
while 201 not in batcher._items:
    worker._take(worker._channel.receive(), batcher)
worker._take([Frame(link.CALL, arrived, link.HEAD.size, len(arrived))], batcher)
del filler
assert set(batcher._items) == {*range(1, 200), 201}, batcher._items
replies, data, start = [], ours.recv(1 << 16), 0
while start < len(data):
    length, kind = link.HEAD.unpack_from(data, start)
    start += link.HEAD.size
    replies.append(link.read_reply(data, start, start + length))
    start += length
assert [(each.id, each.outcome) for each in replies] == [(200, link.ERROR), (202, link.ERROR)], replies
assert all(b"too little memory" in each.response for each in replies), replies
"""


def test_small_calls_arrive_while_there_is_no_memory_for_others() -> None:
    run = subprocess.run([sys.executable, "-c", SHORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
