"""The process that a net runs in: whatever happens to it, each request comes to one end, and only the guilty fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import DeadlineExceeded, Internal, ServingError, StartError, Unavailable
from atserving.local.examples import ROOT
from atserving.v1.evaluator_pb2 import InferResponse
from atserving.v1.serving_pb2 import Resource
from evaluator.serving import patience as module
from tests.evaluator.digits import digits_tar
from tests.evaluator.scripts import OBEDIENT, Served, result, started, wait_for


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace").resolve()


@pytest.fixture(scope="module")
def script(workspace: Path) -> Iterator[Served]:
    """For the tests that leave it fit to answer others, which is all."""
    with started(workspace) as served:
        yield served


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_S", 0.05)
    monkeypatch.setattr(module, "_FACTOR", 0.0)


@pytest.mark.parametrize("wish", ["os._exit", "segfault", "abort", "kill", "close", "fork"])
def test_a_process_that_dies_fails_its_own_request_and_comes_back(script: Served, wish: str) -> None:
    before = script.pid()
    error = script.ask(do=wish)
    assert isinstance(error, Internal)
    assert error.message == "the net's process died"
    assert script.pid() != before
    wait_for(lambda: not Path(f"/proc/{before}").exists())


def test_a_process_that_dies_of_preparing_fails_that_request(script: Served) -> None:
    error = script.ask(prepare="die")
    assert isinstance(error, Internal)
    assert error.message == "the net's process died"
    assert script.pid()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("wish", ["sleep", "spin", "stop"])
def test_a_stuck_call_is_killed_once_its_deadline_has_passed(script: Served, wish: str) -> None:
    before = script.pid()
    with pytest.raises(TimeoutError):
        script.ask(do=wish, timeout_s=0.2)
    assert script.pid() != before


def test_a_short_deadline_alone_does_not_get_a_script_killed(script: Served) -> None:
    before = script.pid()
    with pytest.raises(TimeoutError):
        script.ask(do="slow", timeout_s=0.05)
    assert script.pid() == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("wish", ["raise", "os._exit", "sleep"])
def test_the_others_of_a_batch_get_their_answers(script: Served, wish: str) -> None:
    hostile: dict[str, Any] = {"do": wish, "timeout_s": 0.5} if wish == "sleep" else {"do": wish}
    requests = [{}, hostile, {}, {}]

    def outcome(request: dict[str, Any]) -> Any:
        return later[id(request)].result()

    # By hand, as the one whose deadline passes raises.
    script.hold_batches()
    later = {id(request): script.ask_later(**request) for request in requests}
    try:
        if wish == "sleep":
            with pytest.raises(TimeoutError):
                outcome(hostile)
        else:
            assert isinstance(outcome(hostile), Internal)
        assert all(isinstance(outcome(each), InferResponse) for each in requests if each is not hostile)
    finally:
        script.hold_batches(False)


def test_who_only_ran_beside_a_dying_call_is_run_again(script: Served, workspace: Path) -> None:
    (workspace / "waiting").unlink(missing_ok=True)
    innocent = script.ask_later(prepare="wait")
    wait_for((workspace / "waiting").exists)
    before = script.worker_pid()
    guilty = script.ask_later(prepare="die")
    # Written once the process is gone, so that the innocent call can't be done before.
    wait_for(lambda: script.worker_pid() != before)
    (workspace / "go").touch()
    assert isinstance(guilty.result(), Internal)
    assert "pid" in result(innocent.result())
    (workspace / "go").unlink()


def test_requests_that_wait_when_the_process_is_killed_are_answered_by_the_next(script: Served) -> None:
    before = script.pid()
    later = [script.ask_later(do="slow") for _ in range(20)]
    os.kill(before, signal.SIGKILL)
    outcomes = [each.result() for each in later]
    # Those that ran as it was killed are tried again, each alone: not one of them is to blame.
    assert all(isinstance(each, InferResponse) for each in outcomes)
    assert result(outcomes[-1])["pid"] != before


def test_a_caller_that_goes_takes_its_request_out(tmp_path: Path) -> None:
    script = OBEDIENT.replace('if do == "slow"', 'if do == "mark": Path("ran").touch()\n    if do == "slow"')
    with started(tmp_path, script) as served:
        slow = served.ask_later(do="slow")
        gone = served.ask_later(do="mark")
        gone.cancel()
        assert isinstance(slow.result(), InferResponse)
        assert served.pid()
        assert not (tmp_path / "ran").exists()


def test_a_release_may_bound_every_call(tmp_path: Path) -> None:
    with started(tmp_path, model_params={"script_timeout_s": 0.3}) as served:
        error = served.ask(do="sleep")
        assert isinstance(error, DeadlineExceeded)
        assert error.message == "the net did not answer in time"
        assert served.pid()


def test_closing_ends_a_start_that_would_never_end(tmp_path: Path) -> None:
    script = "import time\nfrom pathlib import Path\ndef net_init(cfg):\n    Path('began').touch()\n"
    script += "    time.sleep(1000)\ndef net_inference(model, args): ...\n"
    timeout_s = 1
    # On a busy machine the time may pass before net_init has begun.
    while not (tmp_path / str(timeout_s // 2) / "began").exists():
        with (
            pytest.raises(StartError, match="init_timeout_s"),
            started(tmp_path / str(timeout_s), script, model_params={"init_timeout_s": timeout_s}),
        ):
            pass
        timeout_s *= 2


def test_a_worker_that_can_not_start_again_sends_callers_elsewhere_and_ends(tmp_path: Path) -> None:
    with started(tmp_path) as served:
        (tmp_path / "release" / "net.py").write_text("broken(")
        other = served.ask_later(prepare="wait")
        wait_for((tmp_path / "waiting").exists)
        guilty = served.ask_later(do="os._exit")
        assert isinstance(served.ended(), StartError)
        assert isinstance(guilty.result(), Internal | Unavailable)
        error = other.result()
        assert isinstance(error, Unavailable)
        assert error.refused


def test_the_evaluators_end_is_the_workers_end(tmp_path: Path) -> None:
    with started(tmp_path) as served:
        its = served.pid()
        served.hang_up()
        wait_for(lambda: not Path(f"/proc/{its}").exists() or "Z" in Path(f"/proc/{its}/stat").read_text())


ODD = """
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
        if "cut" in req["params"]:
            memory = [each for each in Path("/proc/self/fd").iterdir() if "progress" in os.readlink(each)]
            os.ftruncate(int(memory[0].name), 0)
    return [{"code": 0, "result": {"pid": model["pid"]}} for _ in args["reqs"]]
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with started(tmp_path_factory.mktemp("odd").resolve(), ODD) as served:
        yield served


@pytest.mark.parametrize("where", ["prepare", "infer"])
@pytest.mark.parametrize(
    ("what", "status", "message"),
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
def test_whatever_a_script_raises_comes_to_its_caller_alone(
    odd: Served, where: str, what: str, status: int, message: str | None
) -> None:
    before = odd.pid()
    # More often than there are threads.
    for _ in range(4):
        error = odd.ask(**{where: what})
        assert isinstance(error, ServingError)
        assert (error.status, error.code, error.refused) == (status, status, False)
        assert message is None or error.message == message
    assert odd.pid() == before


def test_a_script_can_not_take_the_memory_away_that_tells_what_it_is_at(odd: Served) -> None:
    error = odd.ask(cut=True)
    assert isinstance(error, Internal)
    assert error.message == "the forward pass failed"
    assert odd.pid()


@pytest.mark.usefixtures("impatient")
def test_a_process_that_is_at_nothing_and_answers_nothing_is_killed(odd: Served) -> None:
    before = odd.pid()
    os.kill(before, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        odd.ask(timeout_s=0.2)
    assert odd.pid() != before


def test_a_pause_is_no_end(odd: Served) -> None:
    before = odd.pid()
    later = [odd.ask_later(Resource(body=bytes(8 << 20))) for _ in range(12)]
    for _ in range(10):
        os.kill(before, signal.SIGSTOP)
        os.kill(before, signal.SIGCONT)
    assert [result(each.result())["pid"] for each in later] == [before] * 12


def test_the_warm_up_tells_how_long_calls_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_S", 0.4)
    script = "import os, time\ndef net_init(cfg): return {}\ndef net_inference(model, args):\n    time.sleep(0.9)\n"
    script += "    return [{'code': 0, 'result': {'pid': os.getpid()}} for _ in args['reqs']]\n"
    with started(tmp_path, script) as served:
        before = served.worker_pid()
        with pytest.raises(TimeoutError):
            served.ask(timeout_s=0.1)
        assert served.pid() == before


@contextmanager
def loading_for_ever(folder: Path, says: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A check of a release whose net never comes to be, and what that has said of itself."""
    said = folder / "said"
    script = "import os, time\nfrom pathlib import Path\ndef net_init(cfg):\n"
    script += f"    Path('{said}').write_text({says})\n    time.sleep(1000)\ndef net_inference(model, args): ...\n"
    digits_tar(folder / "release.tar", **{"net.py": script.encode()})
    command = [sys.executable, "-m", "evaluator", "check", str(folder / "release.tar")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as check:
        wait_for(lambda: said.exists() and said.read_text())
        yield check, said.read_text()


def test_a_worker_ends_with_its_evaluator_even_while_it_loads(tmp_path: Path) -> None:
    with loading_for_ever(tmp_path, "str(os.getpid())") as (check, pid):
        check.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_a_check_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    with loading_for_ever(tmp_path, "cfg['custom_values']['workspace']") as (check, folder):
        assert Path(folder).exists()
        check.terminate()
        assert check.wait(60) == 130
    assert not Path(folder).exists()
