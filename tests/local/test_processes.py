"""The runner of the local mesh restarts processes, stops them in order, and leaves none behind."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from atserving.local.child import ChildProcess, bound_to_parent
from atserving.local.examples import ROOT
from atserving.local.proc import is_alive
from atserving.local.processes import ManagedProcess, ProcessGroup, State
from tests.waiting import until

IGNORES_SIGTERM = "trap '' TERM; echo ready; while :; do sleep 1; done"
LEAVES_A_CHILD = "sh -c 'while :; do sleep 1; done' & echo $!; exec sleep 1000"

Make = Callable[..., ManagedProcess]


def shell(name: str, script: str, folder: Path, stop_s: float = 20) -> ManagedProcess:
    return ManagedProcess(name, ChildProcess(["sh", "-c", script], folder / f"{name}.log"), stop_s=stop_s)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Return a function that starts a process with a shell script. The process is stopped at the end of the test."""
    made: list[ManagedProcess] = []

    def start(script: str, stop_s: float = 20) -> ManagedProcess:
        made.append(shell(f"process-{len(made)}", script, tmp_path, stop_s))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        await each.stop()


async def test_a_process_that_dies_is_started_again(make: Make) -> None:
    process = make("echo started; exec sleep 1000")
    await until(lambda: process.log_text() == "started\n")
    first = process.pid
    process.kill()
    await until(lambda: process.log_text() == "started\n" * 2)
    assert process.pid not in (None, first)


async def test_a_process_that_dies_at_once_is_started_again_and_again(make: Make) -> None:
    process = make("echo started; exit 3")
    await until(lambda: process.log_text().count("started") > 3)
    await until(lambda: process.state is State.WAITING)


async def test_a_program_that_does_not_exist_is_named_in_the_log(tmp_path: Path) -> None:
    process = ManagedProcess("nothing", ChildProcess(["/no/such/program"], tmp_path / "log"))
    process.start()
    await until(lambda: "/no/such/program: not found" in process.log_text())
    await process.stop()


async def test_a_process_that_lives_for_a_second_runs(make: Make) -> None:
    process = make("exec sleep 1000")
    assert process.state is State.STARTING
    await until(lambda: process.state is State.RUNNING)


async def test_a_stopped_process_stays_down_until_it_is_started(make: Make) -> None:
    process = make("echo started; exec sleep 1000")
    await until(process.log_text)
    pid = process.pid
    await process.stop()
    assert (process.pid, process.state) == (None, State.STOPPED)
    assert not is_alive(pid or 0)
    process.start()
    await until(lambda: process.log_text() == "started\n" * 2)


async def test_a_process_can_be_stopped_while_it_waits_for_its_next_start(make: Make) -> None:
    process = make("exit 3")
    await until(lambda: process.state is State.WAITING)
    await process.stop()
    assert process.state is State.STOPPED


async def test_a_process_that_ignores_sigterm_is_killed(make: Make) -> None:
    process = make(IGNORES_SIGTERM, stop_s=0.2)
    await until(process.log_text)
    pid = process.pid
    await process.stop()
    assert not is_alive(pid or 0)


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_children_end_with_their_process(make: Make, end: str) -> None:
    process = make(LEAVES_A_CHILD)
    await until(process.log_text)
    child = int(process.log_text())
    assert is_alive(child)
    if end == "stop":
        await process.stop()
    else:
        process.kill()
    await until(lambda: not is_alive(child))


async def test_stages_stop_one_after_the_other_the_last_first(tmp_path: Path) -> None:
    """Later stages stop more slowly: without the order, the names would be the other way round."""
    stopped = tmp_path / "stopped"
    script = "trap 'sleep {delay}; echo {name} >> {file}; exit' TERM; echo ready; while :; do sleep 0.01; done"
    stages = [
        [shell(name, script.format(name=name, delay=delay, file=stopped), tmp_path) for name in names]
        for names, delay in ((["etcd"], 0), (["registry"], 0.1), (["gate", "evaluator"], 0.2))
    ]
    group = ProcessGroup(*stages)
    group.start()
    for each in group:
        await until(each.log_text)
    await group.stop()
    names = stopped.read_text().split()
    assert (set(names[:2]), names[2:]) == ({"gate", "evaluator"}, ["registry", "etcd"])
    assert {each.state for each in group} == {State.STOPPED}


HOLDER = """
import asyncio, sys
from pathlib import Path
from atserving.local.child import ChildProcess
from atserving.local.proc import is_alive
from atserving.local.processes import ManagedProcess, ProcessGroup

async def main():
    folder = Path(sys.argv[1])
    scripts = [*sys.argv[2:]]
    children = [ChildProcess(["sh", "-c", each], folder / f"{n}.log") for n, each in enumerate(scripts)]
    group = ProcessGroup([ManagedProcess(str(n), each) for n, each in enumerate(children)])
    group.start()
    while not all(each.log_text() for each in group):
        await asyncio.sleep(0.01)
    print(*(each.pid for each in group), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    scripts = ["echo ready; exec sleep 1000", IGNORES_SIGTERM]
    holder = await asyncio.create_subprocess_exec(
        *bound_to_parent([sys.executable, "-c", HOLDER, str(tmp_path), *scripts]), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout
    pids = [int(each) for each in (await holder.stdout.readline()).split()]
    assert len(pids) == len(scripts)
    assert all(map(is_alive, pids))
    holder.kill()
    await holder.wait()
    await until(lambda: not any(map(is_alive, pids)), "the processes have ended with their parent")


SLEEPER = """
import os, time
from pathlib import Path
from tests.processes import Process

def test_sleeps():
    process = Process(["sleep", "1000"])
    process.start()
    Path({pids!r}).write_text(f"{{os.getpid()}} {{process.pid}}\\n")
    time.sleep(1000)
"""


@pytest.mark.parametrize("killed", ["pytest", "its worker"])
async def test_no_process_outlives_a_test_suite_that_is_killed(killed: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "test_sleeper.py").write_text(SLEEPER.format(pids=str(pids)))
    # The settings of these tests, without their folder.
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-n", "1", f"--rootdir={tmp_path}"]
    suite = await asyncio.create_subprocess_exec(
        *bound_to_parent([sys.executable, "-m", "pytest", *options, str(tmp_path / "test_sleeper.py")]),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
    )
    await until(lambda: pids.exists() and pids.read_text().endswith("\n"), "the test runs")
    worker, sleeper = map(int, pids.read_text().split())
    # xdist ends a worker that runs code, after a while.
    os.kill(worker, signal.SIGSTOP)
    os.kill(suite.pid if killed == "pytest" else worker, signal.SIGKILL)
    await until(lambda: not is_alive(worker) and not is_alive(sleeper), "the worker and its process have ended")
    if suite.returncode is None:
        suite.kill()
    await suite.wait()


def test_a_process_whose_parent_died_before_it_could_ask_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    command = shlex.join(bound_to_parent(["touch", str(ran)]))
    # The shell between is the parent of the command, and not the process that the command was made for.
    assert subprocess.run(["sh", "-c", f"{command}; exit $?"], check=False).returncode == 1
    assert not ran.exists()


async def test_signals_reach_a_process_and_its_status_is_returned(tmp_path: Path) -> None:
    child = ChildProcess(["sleep", "1000"], tmp_path / "log")
    child.start()
    child.send(signal.SIGTERM)
    assert await child.ended() == -signal.SIGTERM
    child.send(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    child.start()
    with pytest.raises(TimeoutError):
        child.wait(0.01)
    os.kill(child.pid, signal.SIGSTOP)
    child.kill_session()
    assert child.wait() == -signal.SIGKILL
