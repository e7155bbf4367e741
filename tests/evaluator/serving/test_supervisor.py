"""The supervisor restarts a worker process that crashes or hangs. Each request gets one reply; only the guilty fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError, StartError, Unavailable
from atserving.local.child import bound_to_parent
from atserving.local.examples import ROOT
from atserving.v1.evaluator_pb2 import InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.serving import patience, supervisor
from tests.evaluator.digits import digits_tar
from tests.evaluator.scripts import BlockingSupervisor, result, started, wait_for


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace").resolve()


@pytest.fixture(scope="module")
def script(workspace: Path) -> Iterator[BlockingSupervisor]:
    """Run one worker for all tests here; each must leave it able to reply."""
    with started(workspace) as worker:
        yield worker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls count as stuck shortly after their deadlines."""
    monkeypatch.setattr(patience, "LEAST_S", 0.05)
    monkeypatch.setattr(patience, "_FACTOR", 0.0)


@pytest.fixture(autouse=True)
def no_marks(workspace: Path) -> None:
    """Remove the files with which a test and its script wait for each other."""
    for name in ("began", "go", "prepared", "waiting"):
        (workspace / name).unlink(missing_ok=True)


def time_out(script: BlockingSupervisor, workspace: Path, **request: Any) -> int:
    """Ask until a deadline passes while the script runs the request; return the pid of that process.

    On a busy machine a deadline may pass before the script has begun: the next one is longer.
    """
    began = workspace / "began"
    timeout_s = 0.1
    while True:
        pid = script.pid()
        began.unlink(missing_ok=True)
        with pytest.raises(TimeoutError):
            script.ask(began="began", timeout_s=timeout_s, **request)
        if began.exists():
            return pid
        timeout_s *= 2


def has_ended(pid: int | str) -> bool:
    """Return whether a process has ended; its parent may not have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def let_the_supervisor_watch(script: BlockingSupervisor) -> None:
    """Exchange some messages with the worker, so that the supervisor looks for stuck calls meanwhile."""
    for _ in range(20):
        assert isinstance(script.ask(prepare="refuse"), InvalidArgument)


@pytest.mark.parametrize("action", ["os._exit", "segfault", "abort", "kill", "close", "fork"])
def test_crash_fails_its_own_request_and_restarts_the_process(script: BlockingSupervisor, action: str) -> None:
    before = script.pid()
    error = script.ask(do=action)
    assert isinstance(error, Internal)
    assert error.message == "the net's process died"
    assert script.pid() != before
    wait_for(lambda: not Path(f"/proc/{before}").exists())


def test_crash_during_a_preparation_fails_its_own_request(script: BlockingSupervisor) -> None:
    error = script.ask(prepare="crash")
    assert isinstance(error, Internal)
    assert error.message == "the net's process died"
    assert script.pid()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("action", ["sleep", "spin", "stop"])
def test_stuck_call_is_killed_after_its_deadline(script: BlockingSupervisor, workspace: Path, action: str) -> None:
    before = time_out(script, workspace, do=action)
    assert script.pid() != before


def test_call_past_its_deadline_is_not_stuck_before_the_least_patience(
    script: BlockingSupervisor, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "LEAST_S", 60.0)
    monkeypatch.setattr(supervisor, "_WATCH_S", 0.001)
    before = time_out(script, workspace, do="wait")
    let_the_supervisor_watch(script)
    (workspace / "go").touch()
    assert script.pid() == before


def test_worker_is_not_unresponsive_while_it_sends_a_late_reply(
    script: BlockingSupervisor, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No call counts as stuck.
    monkeypatch.setattr(patience, "_FACTOR", 1e9)
    monkeypatch.setattr(patience, "MOST_S", 600.0)
    monkeypatch.setattr(supervisor, "_WATCH_S", 0.005)
    before = script.pid()
    late = script.ask_later(do="wait, many bytes")
    wait_for((workspace / "waiting").exists)
    late.cancel()
    overdue_s = time.monotonic() + patience.LEAST_S
    wait_for(lambda: time.monotonic() > overdue_s)
    # The worker is idle between the end of the call and its reply, which is long.
    (workspace / "go").touch()
    assert script.pid() == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("action", ["raise", "os._exit", "sleep"])
def test_hostile_request_fails_alone_of_its_batch(script: BlockingSupervisor, workspace: Path, action: str) -> None:
    script.hold_batches()
    try:
        # Long enough for the call to begin, also on a busy machine.
        late = {"timeout_s": 5} if action == "sleep" else {}
        requests: list[dict[str, Any]] = [{}, {"do": action, "began": "began", **late}, {}, {}]
        first, hostile, *others = [script.ask_later(**each) for each in requests]
        if action == "sleep":
            with suppress(TimeoutError):
                assert isinstance(hostile.result(), DeadlineExceeded)
            assert (workspace / "began").exists()
        else:
            assert isinstance(hostile.result(), Internal)
        assert all(isinstance(each.result(), InferResponse) for each in (first, *others))
    finally:
        script.hold_batches(False)


def test_calls_beside_a_crashed_call_are_retried(script: BlockingSupervisor, workspace: Path) -> None:
    innocent = script.ask_later(prepare="wait")
    wait_for((workspace / "waiting").exists)
    before = script.worker_pid()
    guilty = script.ask_later(prepare="crash")
    # The innocent call can't finish before the process has ended.
    wait_for(lambda: script.worker_pid() != before)
    (workspace / "go").touch()
    assert isinstance(guilty.result(), Internal)
    assert "pid" in result(innocent.result())


def test_requests_of_a_killed_process_are_retried_in_the_next(script: BlockingSupervisor, workspace: Path) -> None:
    before = script.pid()
    later = [script.ask_later(do="wait") for _ in range(20)]
    wait_for((workspace / "waiting").exists)
    os.kill(before, signal.SIGKILL)
    (workspace / "go").touch()
    # Requests that ran in the killed process run again alone: none of them is to blame.
    pids = {result(each.result())["pid"] for each in later}
    assert before not in pids


def test_cancelled_request_does_not_run(script: BlockingSupervisor, workspace: Path) -> None:
    running = script.ask_later(do="wait")
    wait_for((workspace / "waiting").exists)
    cancelled = script.ask_later(began="began")
    cancelled.cancel()
    # The worker reads messages in order: once it prepares this one, it has read of the cancellation.
    last = script.ask_later(prepare="mark")
    wait_for((workspace / "prepared").exists)
    (workspace / "go").touch()
    assert isinstance(running.result(), InferResponse)
    assert isinstance(last.result(), InferResponse)
    assert not (workspace / "began").exists()


def test_release_can_limit_the_time_of_every_call(tmp_path: Path) -> None:
    with started(tmp_path, model_params={"script_timeout_s": 0.3}) as worker:
        error = worker.ask(do="sleep")
        assert isinstance(error, DeadlineExceeded)
        assert error.message == "the net did not answer in time"
        # On a busy machine an ordinary call can take too long as well, but not every time.
        wait_for(lambda: isinstance(worker.ask(), InferResponse))


def test_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    script = "import os, time\nfrom pathlib import Path\ndef net_init(cfg):\n"
    script += "    Path('began').write_text(str(os.getpid()))\n"
    script += "    time.sleep(1000)\ndef net_inference(model, args): ...\n"
    pids: list[str] = []
    init_timeout_s = 1
    # On a busy machine the time may be over before the process gets to the script.
    while not pids:
        init_timeout_s *= 2
        folder = tmp_path / str(init_timeout_s)
        folder.mkdir()
        with (
            pytest.raises(StartError, match="init_timeout_s"),
            started(folder, script, model_params={"init_timeout_s": init_timeout_s}),
        ):
            pass
        pids = [pid for path in folder.glob("began") if (pid := path.read_text())]
    wait_for(lambda: has_ended(pids[0]))


def test_supervisor_that_can_not_restart_the_worker_refuses_its_calls_and_ends(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        (tmp_path / "release" / "net.py").write_text("broken(")
        other = worker.ask_later(prepare="wait")
        wait_for((tmp_path / "waiting").exists)
        guilty = worker.ask_later(do="os._exit")
        assert isinstance(worker.run_error(), StartError)
        assert isinstance(guilty.result(), Internal | Unavailable)
        error = other.result()
        assert isinstance(error, Unavailable)
        assert error.refused


def test_worker_ends_with_its_evaluator(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        pid = worker.pid()
        worker.close_socket()
        wait_for(lambda: has_ended(pid))


RAISING = """
import os, time
from pathlib import Path
from evaluator import scripting
from atserving.errors import ServingError

def net_init(cfg):
    return {"pid": os.getpid(), "batch_size": 4}

def net_preprocess(model, req):
    if "prepare" in req["params"]: raise eval(req["params"]["prepare"])
    return req

def net_inference(model, args):
    for req in args["reqs"]:
        if "infer" in req["params"]: raise eval(req["params"]["infer"])
        if "truncate" in req["params"]:
            memory = [each for each in Path("/proc/self/fd").iterdir() if "progress" in os.readlink(each)]
            os.ftruncate(int(memory[0].name), 0)
    return [{"code": 0, "result": {"pid": model["pid"]}} for _ in args["reqs"]]
"""


@pytest.fixture(scope="module")
def raising(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingSupervisor]:
    with started(tmp_path_factory.mktemp("raising").resolve(), RAISING) as worker:
        yield worker


@pytest.mark.parametrize("stage", ["prepare", "infer"])
@pytest.mark.parametrize(
    ("exception", "status", "message"),
    [
        ("scripting.InvalidArgument(ValueError('no face'))", 400, "no face"),
        ("scripting.InvalidArgument('\\ud800 odd')", 400, "? odd"),
        ("scripting.InvalidArgument('x' * (70 << 20))", 400, "x" * 4096),
        ("scripting.InvalidArgument('no face', code=2**40)", 400, "no face"),
        ("scripting.InvalidArgument('no face', refused=True)", 400, "no face"),
        ("type('Odd', (ServingError,), {'status': 'odd'})('no face')", 500, "no face"),
        ("ValueError('\\ud800 odd')", 500, None),
    ],
)
def test_exception_of_a_script_reaches_only_its_caller(
    raising: BlockingSupervisor, stage: str, exception: str, status: int, message: str | None
) -> None:
    before = raising.pid()
    # The error must not end one of the worker's threads: send more requests than there are threads.
    for _ in range(4):
        error = raising.ask(**{stage: exception})
        assert isinstance(error, ServingError)
        assert (error.status, error.code, error.refused) == (status, status, False)
        assert message is None or error.message == message
    assert raising.pid() == before


def test_script_can_not_truncate_the_progress_memory(raising: BlockingSupervisor) -> None:
    error = raising.ask(truncate=True)
    assert isinstance(error, Internal)
    assert error.message == "the forward pass failed"
    assert raising.pid()


@pytest.mark.usefixtures("impatient")
def test_process_that_does_not_take_up_calls_is_killed(raising: BlockingSupervisor) -> None:
    before = raising.pid()
    os.kill(before, signal.SIGSTOP)
    # On a busy machine a deadline may pass before the call is sent.
    while raising.worker_pid() == before:
        with suppress(TimeoutError):
            raising.ask(timeout_s=0.2)
    assert raising.pid() != before


def test_paused_worker_is_not_restarted(raising: BlockingSupervisor) -> None:
    before = raising.pid()
    later = [raising.ask_later(Resource(body=bytes(8 << 20))) for _ in range(12)]
    for _ in range(10):
        os.kill(before, signal.SIGSTOP)
        os.kill(before, signal.SIGCONT)
    assert [result(each.result())["pid"] for each in later] == [before] * 12


SLOW = """
import os, time
from pathlib import Path
from evaluator import scripting

def net_init(cfg): return {}

def net_preprocess(model, req):
    if "prepare" in (req.get("params") or {}): raise scripting.InvalidArgument("refused")
    return req

def net_inference(model, args):
    if Path("warm").exists():
        Path("waiting").touch()
        while not Path("go").exists(): time.sleep(0.01)
    else:
        Path("warm").touch()
        time.sleep(0.3)
    return [{"code": 0} for _ in args["reqs"]]
"""


def test_patience_grows_with_the_time_that_the_warm_up_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A call past its deadline would be stuck at once without the patience learned from the warm-up.
    monkeypatch.setattr(patience, "LEAST_S", 0.0)
    monkeypatch.setattr(patience, "_FACTOR", 1000.0)
    monkeypatch.setattr(patience, "MOST_S", 60.0)
    monkeypatch.setattr(supervisor, "_WATCH_S", 0.001)
    with started(tmp_path, SLOW) as worker:
        before = worker.worker_pid()
        running = worker.ask_later()
        wait_for((tmp_path / "waiting").exists)
        running.cancel()
        let_the_supervisor_watch(worker)
        assert worker.worker_pid() == before


@contextmanager
def check_that_loads_forever(folder: Path, expression: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Check a release whose net_init never returns. Yield the check's process, and the value of a script's expression.

    ``cfg`` is a name in the expression.
    """
    script = "import os, time\nfrom pathlib import Path\ndef net_init(cfg):\n"
    script += f"    Path('value').write_text({expression})\n    time.sleep(1000)\ndef net_inference(model, args): ...\n"
    digits_tar(folder / "release.tar", **{"net.py": script.encode()})
    command = [sys.executable, "-m", "evaluator", "check", str(folder / "release.tar")]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(bound_to_parent(command), cwd=ROOT, stderr=subprocess.DEVNULL, env=environment) as check:

        def values() -> list[str]:
            return [value for path in folder.glob("*/scratch/value") if (value := path.read_text())]

        wait_for(values)
        yield check, values()[0]


def test_worker_that_still_loads_ends_with_its_evaluator(tmp_path: Path) -> None:
    with check_that_loads_forever(tmp_path, "str(os.getpid())") as (check, pid):
        check.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_worker_that_runs_no_code_ends_with_its_evaluator_and_so_does_its_child(tmp_path: Path) -> None:
    child = "__import__('subprocess').Popen(['sleep', '1000'])"
    with check_that_loads_forever(tmp_path, f"str(os.getpid()) + ' ' + str({child}.pid)") as (check, pids):
        worker, sleeper = map(int, pids.split())
        # A script that holds the GIL keeps the worker's threads from running, too.
        os.kill(worker, signal.SIGSTOP)
        check.kill()
    wait_for(lambda: has_ended(worker) and has_ended(sleeper))


def test_stopped_check_removes_its_workspace(tmp_path: Path) -> None:
    with check_that_loads_forever(tmp_path, "cfg['custom_values']['workspace']") as (check, folder):
        assert Path(folder).exists()
        check.terminate()
        assert check.wait(60) == 130
    assert not Path(folder).exists()


@pytest.mark.usefixtures("impatient")
def test_callers_that_leave_or_hurry_cost_nobody_the_worker(
    script: BlockingSupervisor, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a call counts as stuck only once the app's timeout has passed, too."""
    monkeypatch.setattr(supervisor, "_WATCH_S", 0.001)
    script.set_app_timeout(3600)
    try:
        before = time_out(script, workspace, do="wait")
        let_the_supervisor_watch(script)
        (workspace / "go").touch()
        assert script.pid() == before
        for name in ("go", "began", "waiting"):
            (workspace / name).unlink(missing_ok=True)
        leaving = script.ask_later(do="wait", began="began")
        wait_for((workspace / "began").exists)
        leaving.cancel()
        let_the_supervisor_watch(script)
        (workspace / "go").touch()
        assert script.pid() == before
    finally:
        script.set_app_timeout(0)


def test_calls_that_expired_before_they_ran_shorten_no_patience(
    script: BlockingSupervisor, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under overload many calls expire. They must not make the supervisor kill a worker that only takes its time."""
    monkeypatch.setattr(patience, "LEAST_S", 0.05)
    monkeypatch.setattr(supervisor, "_WATCH_S", 0.001)
    # A single shorter call makes it forget a long one.
    monkeypatch.setattr(patience, "_MEMORY", 1)
    slow = script.ask_later(do="wait", began="began")
    wait_for((workspace / "began").exists)
    longer_s = time.monotonic() + 1
    wait_for(lambda: time.monotonic() > longer_s)
    (workspace / "go").touch()
    assert isinstance(slow.result(), InferResponse)
    for name in ("began", "go", "waiting"):
        (workspace / name).unlink(missing_ok=True)
    before = script.worker_pid()
    late = script.ask_later(do="wait", began="began", timeout_s=1)
    wait_for((workspace / "began").exists)
    for expired in [script.ask_later(timeout_s=0.05) for _ in range(5)]:
        with suppress(TimeoutError):
            assert isinstance(expired.result(), DeadlineExceeded)
    with suppress(TimeoutError):
        late.result()
    let_the_supervisor_watch(script)
    assert script.worker_pid() == before
    (workspace / "go").touch()
    assert script.pid() == before
