"""A release's net.py: what it is given, what it may answer, and that nothing it does reaches another's request."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError, StartError
from evaluator.batcher import Batcher
from evaluator.runner import Prepared, Result
from evaluator.script import runner as module
from evaluator.script.runner import ScriptRunner

OBEDIENT = """
import ctypes, os, signal, sys, time
from pathlib import Path
import numpy as np
from evaluator import scripting
import beside

def net_init(cfg):
    return {"error": "", "batch_size": 4, "cfg": cfg, "pid": os.getpid()}

def net_preprocess(model, req):
    wish = (req.get("params") or {}).get("prepare")
    if wish == "wait":
        Path("waiting").touch()
        while not Path("go").exists():
            time.sleep(0.01)
    if wish == "die":
        os._exit(1)
    if wish == "unpicklable":
        return {"data": lambda: None}
    if wish == "refuse":
        raise scripting.InvalidArgument("no face")
    if wish == "exit":
        sys.exit("bye")
    return {**req, "prepared": beside.Marked(os.getpid())}

def net_inference(model, args):
    rets = [answer(model, args, req) for req in args["reqs"]]
    wishes = [(req.get("params") or {}).get("rets") for req in args["reqs"]]
    if "few" in wishes: return rets[:-1]
    if "many" in wishes: return rets * 2
    if "none" in wishes: return None
    return rets

def answer(model, args, req):
    params = req.get("params") or {}
    do = params.get("do")
    if do in HOSTILE: HOSTILE[do]()
    if do == "slow": time.sleep(0.1)
    if do == "ret": return params["ret"]
    if do == "cfg": return {"code": 0, "message": "", "result": model["cfg"]}
    if do == "args":
        data = req["data"] if isinstance(req["data"], list) else [req["data"]]
        same = [open(each["uri"], "rb").read() == each["body"] for each in data]
        seen = [{name: value for name, value in each.items() if name != "body"} for each in data]
        result = {"same": same, "data": seen, "group": isinstance(req["data"], list), "reqid": args["reqid"],
                  "count": len(args["reqs"]), "params": params, "prepared": req["prepared"].pid == os.getpid()}
        return {"code": 0, "message": "hi", "result": result}
    if do == "numbers":
        return {"code": 0, "result": {"x": np.float32(1.5), "y": np.arange(3)}}
    if do == "print":
        print("said by", "the script", file=sys.stdout)
        os.write(1, b"said below python\\n")
    if do == "file":
        Path("result.bin").write_bytes(bytes(range(256)))
        return {"code": 0, "message": "m", "result_file": params.get("as", "result.bin")}
    if do == "bytes": return {"code": 0, "message": "m", "result_file": b"\\x00\\xff"}
    if do == "link":
        if not os.path.islink("link"): os.symlink("/etc/passwd", "link")
        return {"code": 0, "result_file": "link"}
    if do == "nan": return {"code": 0, "result": {"x": float("nan")}}
    if do == "object": return {"code": 0, "result": object()}
    if do == "surrogate": return {"code": 400, "message": "\\ud800 odd"}
    if do == "many bytes": return {"code": 0, "result_file": bytes(49 << 20)}
    if do == "loop":
        loop = []
        loop.append(loop)
        return {"code": 0, "result": loop}
    if do == "refuse": raise scripting.InvalidArgument("too dark")
    return {"code": 0, "message": "", "result": {"pid": model["pid"]}}

def fail(): raise ValueError("in /srv/secret")
def recurse(): return recurse()
def spin():
    while True: pass
def leave_a_child_behind():
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)

HOSTILE = {
    "raise": fail, "sys.exit": sys.exit, "recurse": recurse, "memory": lambda: bytearray(1 << 60),
    "os._exit": lambda: os._exit(0), "segfault": lambda: ctypes.string_at(0), "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "close": lambda: os.closerange(3, 100),
    "fork": leave_a_child_behind,
    "sleep": lambda: time.sleep(1000), "spin": spin, "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
"""
BESIDE = "class Marked:\n    def __init__(self, pid): self.pid = pid\n"


def config(workspace: Path, script: str, **fields: Any) -> dict[str, Any]:
    folder = workspace / "release"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(script)
    (folder / "beside.py").write_text(BESIDE)
    files = {path.name: str(path) for path in folder.iterdir()}
    values = {"workspace": str(workspace), **fields.pop("custom_values", {})}
    given = {"image_width": None, "batch_size": None, "use_device": "CPU", "model_params": {}, "custom_files": {}}
    return {"tar_files": files, "custom_values": values, **given, **fields}


@contextmanager
def started(workspace: Path, script: str = OBEDIENT, **fields: Any) -> Iterator[ScriptRunner]:
    runner = ScriptRunner(config(workspace, script, **fields))
    try:
        runner.start()
        yield runner
    finally:
        runner.close()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace").resolve()


@pytest.fixture(scope="module")
def script(workspace: Path) -> Iterator[ScriptRunner]:
    """For the tests that leave it fit to answer others, which is all."""
    with started(workspace, custom_values={"max_bytes": 1000}) as runner:
        yield runner


def prepared(script: ScriptRunner, deadline_s: float | None = None, *, data: Any = None, **params: Any) -> Prepared:
    return script.prepare("r", {"data": data or {"uri": "", "body": b"abc"}, "params": params}, deadline_s)


def ask(script: ScriptRunner, deadline_s: float | None = None, **params: Any) -> Result | ServingError:
    """The outcome of a batch of one, raised or not."""
    try:
        request = prepared(script, deadline_s, **params)
    except ServingError as error:
        return error
    try:
        return script.infer([request])[0]
    except ServingError as error:
        return error
    finally:
        request.release()


def result(outcome: Result | ServingError) -> Any:
    assert isinstance(outcome, Result), outcome
    assert outcome.json is not None
    return orjson.loads(outcome.json)


def pid(script: ScriptRunner) -> int:
    """Of the process that answers; that it does is asserted."""
    return int(result(ask(script))["pid"])


def wait_for(condition: Callable[[], object]) -> None:
    """Returns once it holds; what is waited for is another process's to do."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_net_init_is_given_the_cfg_of_the_contract(script: ScriptRunner, workspace: Path) -> None:
    cfg = result(ask(script, do="cfg"))
    assert set(cfg) >= {"tar_files", "image_width", "use_device", "batch_size", "custom_files", "custom_values"}
    assert cfg["tar_files"]["net.py"] == str(workspace / "release" / "net.py")
    assert cfg["custom_values"] == {"workspace": str(workspace), "max_bytes": 1000}
    assert script.batch_size == 4


def test_a_req_has_the_bytes_and_a_file_of_them_meanwhile(script: ScriptRunner, workspace: Path) -> None:
    data = {"uri": "", "body": bytes(5000), "attribute": {"n": 2**62 + 1}}
    batch = [prepared(script, do="args", data=data), prepared(script, do="args", data=[data, data], more=[1])]
    single, group = (result(outcome) for outcome in script.infer(batch))
    assert (single["same"], single["group"], single["count"], single["reqid"]) == ([True], False, 2, "r,r")
    assert (group["same"], group["group"], group["params"]) == ([True, True], True, {"do": "args", "more": [1]})
    uris = [each["uri"] for each in (*single["data"], *group["data"])]
    assert len(set(uris)) == 3
    assert all(Path(uri).is_relative_to(workspace) for uri in uris)
    assert single["prepared"] is group["prepared"] is True
    assert single["data"][0]["attribute"] == {"n": 2**62 + 1}
    assert all(Path(uri).exists() for uri in uris)
    for request in batch:
        request.release()
    assert not any(Path(uri).exists() for uri in uris)


def test_integers_stay_integers(script: ScriptRunner) -> None:
    given = {"code": 0, "result": {"n": 2**53 + 1, "m": -(2**63)}}
    assert result(ask(script, do="ret", ret=given)) == given["result"]


def test_results_are_json_or_bytes_or_a_file(script: ScriptRunner, workspace: Path) -> None:
    assert result(ask(script, do="numbers")) == {"x": 1.5, "y": [0, 1, 2]}
    assert ask(script, do="bytes") == Result("m", stream=b"\x00\xff")
    for name in ("result.bin", str(workspace / "result.bin")):
        assert ask(script, do="file", **{"as": name}) == Result("m", stream=bytes(range(256)))
        assert not (workspace / "result.bin").exists()


@pytest.mark.parametrize("wish", ["raise", "sys.exit", "recurse", "memory"])
def test_a_call_that_raises_fails_and_shows_nothing(script: ScriptRunner, wish: str) -> None:
    before = pid(script)
    error = ask(script, do=wish)
    assert isinstance(error, Internal)
    assert error.message == "the forward pass failed"
    assert pid(script) == before


@pytest.mark.parametrize("rets", ["few", "many", "none"])
def test_another_number_of_rets_fails_the_call(script: ScriptRunner, rets: str) -> None:
    error = ask(script, rets=rets)
    assert isinstance(error, Internal)
    assert error.message == "the net did not return one result a request"


@pytest.mark.parametrize("wish", ["nan", "object", "link", "many bytes", "loop"])
def test_what_can_not_be_sent_is_a_500(script: ScriptRunner, wish: str) -> None:
    error = ask(script, do=wish)
    assert isinstance(error, Internal)
    assert error.message == "the net's result is malformed"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "release/../..", ".", "", "no such", 5, "\0"]
)
def test_a_result_file_outside_the_workspace_is_never_read(script: ScriptRunner, path: Any) -> None:
    error = ask(script, do="file", **{"as": path})
    assert isinstance(error, Internal)
    assert error.message == "the net's result is malformed"


@pytest.mark.parametrize(
    "ret", [None, 5, "x", [], {"code": "x"}, {"code": 1.5}, {"code": 2**40}, {"message": 5}, {"code": True}]
)
def test_a_ret_that_is_none_is_a_500(script: ScriptRunner, ret: Any) -> None:
    assert isinstance(ask(script, do="ret", ret=ret), Internal)


def test_a_malformed_ret_fails_its_own_request_alone(script: ScriptRunner) -> None:
    batch = [prepared(script), prepared(script, do="nan"), prepared(script)]
    first, bad, last = script.infer(batch)
    for request in batch:
        request.release()
    assert result(first) == result(last)
    assert isinstance(bad, Internal)


@pytest.mark.parametrize(("code", "status"), [(404, 404), (571, 571), (-3, 400), (7, 500)])
def test_a_scripts_own_code_comes_through(script: ScriptRunner, code: int, status: int) -> None:
    error = ask(script, do="ret", ret={"code": code, "message": "no face"})
    assert isinstance(error, ServingError)
    assert (error.code, error.status, error.message) == (code, status, "no face")


def test_a_message_of_odd_text_can_be_sent(script: ScriptRunner) -> None:
    error = ask(script, do="surrogate")
    assert isinstance(error, ServingError)
    assert error.message == "? odd"


def test_a_script_refuses_a_request_by_raising(script: ScriptRunner) -> None:
    for error, message in ((ask(script, do="refuse"), "too dark"), (ask(script, prepare="refuse"), "no face")):
        assert isinstance(error, InvalidArgument)
        assert error.message == message


@pytest.mark.parametrize("wish", ["exit", "unpicklable"])
def test_a_preparation_that_fails_is_a_500(script: ScriptRunner, wish: str) -> None:
    error = ask(script, prepare=wish)
    assert isinstance(error, Internal)
    assert error.message == "the net failed to prepare the request"


@pytest.mark.parametrize("wish", ["os._exit", "segfault", "abort", "kill", "close", "fork"])
def test_a_process_that_dies_fails_its_own_request_and_comes_back(script: ScriptRunner, wish: str) -> None:
    before = pid(script)
    error = ask(script, do=wish)
    assert isinstance(error, Internal)
    assert error.message == "the net's script died"
    assert pid(script) != before
    wait_for(lambda: not Path(f"/proc/{before}").exists())


@pytest.mark.parametrize("wish", ["sleep", "spin", "stop"])
def test_a_stuck_call_is_killed_once_its_deadline_has_passed(
    script: ScriptRunner, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAST_PATIENCE_S", 0.05)
    before = pid(script)
    error = ask(script, time.monotonic() + 0.2, do=wish)
    assert isinstance(error, DeadlineExceeded)
    assert error.message == "the net's script did not answer in time"
    assert pid(script) != before


def test_a_short_deadline_alone_does_not_get_a_script_killed(script: ScriptRunner) -> None:
    before = pid(script)
    request = prepared(script, do="slow")
    (soon,) = script.infer([dataclasses.replace(request, deadline_s=time.monotonic() + 0.05)])
    request.release()
    assert isinstance(soon, Result)
    assert isinstance(ask(script, time.monotonic() - 1), DeadlineExceeded)
    assert pid(script) == before


@pytest.mark.parametrize("wish", ["raise", "os._exit", "sleep"])
async def test_the_others_of_a_batch_get_their_answers(
    script: ScriptRunner, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAST_PATIENCE_S", 0.05)
    batcher = Batcher[Prepared, Result](script.infer, 3, max_concurrent=3, delay_s=60)
    running = asyncio.create_task(batcher.run())

    async def one(deadline_s: float | None, **params: Any) -> Result:
        request = await asyncio.to_thread(prepared, script, deadline_s, **params)
        with batcher.hold():
            try:
                return (await batcher.submit(request)).value
            finally:
                request.release()

    soon = time.monotonic() + 0.3 if wish == "sleep" else None
    first, bad, last = await asyncio.gather(one(None), one(soon, do=wish), one(None), return_exceptions=True)
    assert isinstance(first, Result)
    assert isinstance(last, Result)
    assert isinstance(bad, DeadlineExceeded if wish == "sleep" else Internal)
    running.cancel()
    await asyncio.wait({running})


def test_who_only_ran_beside_a_dying_call_is_run_again(script: ScriptRunner, workspace: Path) -> None:
    with ThreadPoolExecutor() as threads:
        innocent: Future[Prepared] = threads.submit(prepared, script, prepare="wait")
        wait_for((workspace / "waiting").exists)
        dying = script._process
        assert dying
        guilty = threads.submit(ask, script, prepare="die")
        # Written once the process is gone, so that the innocent call can't be done before.
        wait_for(lambda: dying.dead)
        (workspace / "go").touch()
        assert isinstance(guilty.result(), Internal)
        request = innocent.result()
        assert "pid" in result(script.infer([request])[0])
        request.release()


def test_what_a_script_prints_is_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with started(tmp_path) as script:
        assert isinstance(ask(script, do="print"), Result)
    said = capfd.readouterr()
    assert said.out == ""
    assert '"text":"said by the script"' in said.err
    assert "said below python" in said.err


@pytest.mark.parametrize(
    ("net_init", "message"),
    [
        ("return {'error': 'no\\n weights'}", "no weights"),
        ("raise OSError('/srv/secret')", "net_init raised OSError, see the log"),
        ("sys.exit(3)", "net_init raised RuntimeError, see the log"),
        ("os._exit(3)", "the process of net.py ended during net_init"),
        ("time.sleep(1000)", "net_init did not return within 0.2 s"),
        ("return None", "net_init returned NoneType, should be a dict"),
        ("return {'batch_size': 'x'}", "the batch_size of net_init's model is 'x', should be a positive integer"),
        ("from evaluator import scripting; scripting.net(cfg)", "the release's tar has no deploy.prototxt"),
    ],
)
def test_a_net_init_that_fails_is_one_line(net_init: str, message: str, tmp_path: Path) -> None:
    script = f"import os, sys, time\ndef net_init(cfg):\n    {net_init}\ndef net_inference(model, args): ...\n"
    params = {"init_timeout_s": 0.2} if "sleep" in net_init else {}
    with pytest.raises(StartError) as error, started(tmp_path, script, model_params=params):
        pass
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("def net_init(cfg: ...", "net.py, line 1: "),
        ("import no_such_module", "net.py raised ModuleNotFoundError while it was loaded, see the log"),
        ("raise SystemExit", "net.py raised SystemExit while it was loaded, see the log"),
        ("def net_init(cfg): ...", "net.py has no function net_inference"),
        ("net_init = net_inference = print\nnet_preprocess = 5", "net.py has no function net_preprocess"),
    ],
)
def test_a_script_that_is_none_is_one_line(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StartError) as error, started(tmp_path, script):
        pass
    assert str(error.value).startswith(message)


def test_closing_ends_a_start_that_would_never_end(tmp_path: Path) -> None:
    script = "import time\nfrom pathlib import Path\ndef net_init(cfg):\n    Path('began').touch()\n"
    script += "    time.sleep(1000)\ndef net_inference(model, args): ...\n"
    runner = ScriptRunner(config(tmp_path, script))
    failed: list[str] = []

    def start() -> None:
        with pytest.raises(StartError) as error:
            runner.start()
        failed.append(str(error.value))

    thread = threading.Thread(target=start)
    thread.start()
    wait_for((tmp_path / "began").exists)
    runner.close()
    thread.join(60)
    assert failed == ["the process of net.py ended during net_init"]


def test_a_script_that_can_not_start_again_fails_requests_until_it_can(tmp_path: Path) -> None:
    with started(tmp_path) as script:
        path = tmp_path / "release" / "net.py"
        path.write_text("broken(")
        assert isinstance(ask(script, do="os._exit"), Internal)
        error = ask(script)
        assert isinstance(error, Internal)
        assert error.message == "the net's script can't be started again"
        path.write_text(OBEDIENT)
        assert pid(script)


def test_the_evaluators_end_is_the_scripts_end(tmp_path: Path) -> None:
    with started(tmp_path) as script:
        its = pid(script)
        assert script._process
        for lane in script._process._lanes:
            lane.shutdown(2)
        wait_for(lambda: not Path(f"/proc/{its}").exists() or "Z" in Path(f"/proc/{its}/stat").read_text())


@pytest.mark.parametrize(
    ("answer", "starts"),
    [
        ("return [{'code': 0, 'result': {}}] * len(args['reqs'])", True),
        ("return [{'code': 400 if isinstance(r['data'], dict) else 0} for r in args['reqs']]", True),
        ("raise ValueError('no attribute')", True),
        ("os._exit(1)", False),
    ],
)
def test_only_a_script_that_dies_of_the_warm_up_does_not_start(answer: str, starts: bool, tmp_path: Path) -> None:
    script = f"import os\ndef net_init(cfg): return {{}}\ndef net_inference(model, args):\n    {answer}\n"
    with started(tmp_path, script, batch_size=2) as runner:
        assert runner.batch_size == 2
        if starts:
            runner.warm_up()
        else:
            with pytest.raises(StartError, match="the net failed to warm up: the net's script died"):
                runner.warm_up()


def test_no_file_is_left_of_the_requests(script: ScriptRunner, workspace: Path) -> None:
    assert pid(script)
    assert os.listdir(workspace / "requests") == []


@pytest.mark.parametrize("value", [0, -1, "5", True, float("inf")])
def test_a_wrong_timeout_stops_the_start(value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"model_params\.script_timeout_s is .*, should be a positive number"):
        ScriptRunner(config(tmp_path, "", model_params={"script_timeout_s": value}))


def test_a_release_may_bound_every_call(tmp_path: Path) -> None:
    with started(tmp_path, model_params={"script_timeout_s": 0.3}) as script:
        assert isinstance(ask(script, do="sleep"), DeadlineExceeded)
