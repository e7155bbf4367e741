"""A request that runs alone has all CPUs; one that runs beside others has one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from evaluator.net_config import NetConfig
from evaluator.worker.main import NetWork
from evaluator.worker.net_runner import NetRunner, Prepared, Result


class Runner:
    """A runner that says who ran a batch, once it may go on."""

    def __init__(self, name: str, wide: Runner | None = None) -> None:
        self.name = name
        self.wide = wide
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def infer(self, batch: Sequence[Prepared]) -> list[Result]:
        self.entered.release()
        self.go_on.acquire()
        return [Result(self.name)] * len(batch)


def ran(work: NetWork, size: int, names: list[str]) -> threading.Thread:
    """Run a batch in a thread, which adds the name of its runner."""

    def run() -> None:
        outcomes, _ = work.infer([Prepared("r", None)] * size)
        names.extend(cast(Result, each).message for each in outcomes)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_only_a_request_alone_runs_on_all_cpus(tmp_path: Path) -> None:
    wide = Runner("wide")
    narrow = Runner("narrow", wide)
    work = NetWork(cast(NetRunner, cast(Any, narrow)), None, NetConfig({}, workspace=tmp_path))
    names: list[str] = []
    first = ran(work, 1, names)
    wide.entered.acquire()
    beside = ran(work, 1, names)
    narrow.entered.acquire()
    for runner, thread in ((narrow, beside), (wide, first)):
        runner.go_on.release()
        thread.join()
    assert names == ["narrow", "wide"]
    for size, runner in ((2, narrow), (1, wide)):
        runner.go_on.release()
        ran(work, size, names).join()
    assert names[2:] == ["narrow", "narrow", "wide"]


def test_a_net_without_such_a_session_runs_as_planned(tmp_path: Path) -> None:
    runner = Runner("narrow")
    runner.go_on.release()
    work = NetWork(cast(NetRunner, cast(Any, runner)), None, NetConfig({}, workspace=tmp_path))
    names: list[str] = []
    ran(work, 1, names).join()
    assert names == ["narrow"]
