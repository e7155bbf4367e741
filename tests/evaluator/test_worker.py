"""The process that a net runs in: whatever happens to it, each request comes to one end, and only the guilty fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import DeadlineExceeded, Internal, StartError, Unavailable
from atserving.v1.evaluator_pb2 import InferResponse
from evaluator.worker import worker as module
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
    monkeypatch.setattr(module, "_LEAST_PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "_PATIENCE", 0.0)


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
    assert all(result(each)["pid"] != before for each in outcomes if isinstance(each, InferResponse))
    # Those that ran as it was killed are tried again, each alone: not one of them is to blame.
    assert (
        all(isinstance(each, InferResponse) for each in outcomes)
        or sum(isinstance(each, Internal) for each in outcomes) == 1
    )


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
    with (
        pytest.raises(StartError, match="init_timeout_s"),
        started(tmp_path, script, model_params={"init_timeout_s": 1}),
    ):
        pass
    assert (tmp_path / "began").exists()


def test_a_worker_that_can_not_start_again_sends_callers_elsewhere_and_ends(tmp_path: Path) -> None:
    with started(tmp_path) as served:
        (tmp_path / "release" / "net.py").write_text("broken(")
        guilty, other = served.ask_later(do="os._exit"), served.ask_later(do="slow")
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
