"""A release's net.py gets its requests as the contract says, and each of its results becomes one reply."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atserving.errors import Internal, InvalidArgument, ServingError, StartError
from atserving.v1.evaluator_pb2 import InferResponse
from atserving.v1.serving_pb2 import Resource
from tests.evaluator.scripts import BlockingSupervisor, result, started, wait_for


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace").resolve()


@pytest.fixture(scope="module")
def script(workspace: Path) -> Iterator[BlockingSupervisor]:
    """Serve the script of :mod:`tests.evaluator.scripts` to all tests here; none may end its process."""
    with started(workspace, custom_values={"max_bytes": 1000}) as worker:
        yield worker


def test_net_init_gets_the_cfg_of_the_contract(script: BlockingSupervisor, workspace: Path) -> None:
    cfg = result(script.ask(do="cfg"))
    assert set(cfg) >= {"tar_files", "image_width", "use_device", "batch_size", "custom_files", "custom_values"}
    assert cfg["tar_files"]["net.py"] == str(workspace / "release" / "net.py")
    assert cfg["custom_values"] == {"workspace": str(workspace), "max_bytes": 1000}
    assert script.supervisor.plan.batch_size == 4


def test_resource_of_a_req_has_its_bytes_and_a_temporary_file(script: BlockingSupervisor, workspace: Path) -> None:
    data = Resource(body=bytes(500), attribute_json=f'{{"n": {2**62 + 1}}}')

    def ask(*data: Resource, **options: Any) -> Any:
        return result(script.ask(*data, do="args", **options))

    single, group = ask(data), ask(data, data, group=True, more=[1])
    assert (single["same"], single["group"], single["count"], single["reqid"]) == ([True], False, 1, "r")
    assert (group["same"], group["group"], group["params"]) == ([True, True], True, {"do": "args", "more": [1]})
    uris = [each["uri"] for each in (*single["data"], *group["data"])]
    assert len(set(uris)) == 3
    assert all(Path(uri).is_relative_to(workspace) for uri in uris)
    assert single["prepared"] is group["prepared"] is True
    assert single["data"][0]["attribute"] == {"n": 2**62 + 1}
    assert not any(Path(uri).exists() for uri in uris)


def test_body_larger_than_the_limit_of_a_resource_is_refused(script: BlockingSupervisor) -> None:
    assert result(script.ask(Resource(body=bytes(1000))))
    error = script.ask(Resource(body=bytes(1001)))
    assert isinstance(error, InvalidArgument)
    assert error.message == "the resource is larger than 1000 bytes"


def test_group_of_one_is_a_list(script: BlockingSupervisor) -> None:
    assert result(script.ask(do="args", group=True))["group"] is True


def test_batch_is_one_call_of_the_script(script: BlockingSupervisor) -> None:
    batch = script.ask_in_one_batch(*({"do": "args", "reqid": name} for name in "abcd"))
    assert [result(each)["count"] for each in batch] == [4, 4, 4, 4]
    assert {frozenset(result(each)["reqid"].split(",")) for each in batch} == {frozenset("abcd")}


def test_64_bit_integers_stay_exact(script: BlockingSupervisor) -> None:
    ret = {"code": 0, "result": {"n": 2**53 + 1, "m": -(2**63)}}
    assert result(script.ask(do="ret", ret=ret)) == ret["result"]


def test_result_is_json_or_bytes_or_a_file(script: BlockingSupervisor, workspace: Path) -> None:
    assert result(script.ask(do="numbers")) == {"x": 1.5, "y": [0, 1, 2]}
    assert script.ask(do="bytes") == InferResponse(message="m", stream=b"\x00\xff")
    for name in ("result.bin", str(workspace / "result.bin")):
        assert script.ask(do="file", **{"as": name}) == InferResponse(message="m", stream=bytes(range(256)))
        assert not (workspace / "result.bin").exists()


@pytest.mark.parametrize("action", ["raise", "sys.exit", "recurse"])
def test_call_that_raises_gives_code_500_without_details(script: BlockingSupervisor, action: str) -> None:
    before = script.pid()
    error = script.ask(do=action)
    assert isinstance(error, Internal)
    assert error.message == "the forward pass failed"
    assert script.pid() == before


@pytest.mark.parametrize("rets", ["few", "many", "none"])
def test_wrong_number_of_rets_fails_the_call(script: BlockingSupervisor, rets: str) -> None:
    error = script.ask(rets=rets)
    assert isinstance(error, Internal)
    assert error.message == "the net did not return one result a request"


@pytest.mark.parametrize("action", ["nan", "object", "link", "many bytes", "loop"])
def test_result_that_can_not_be_encoded_gives_code_500(script: BlockingSupervisor, action: str) -> None:
    error = script.ask(do=action)
    assert isinstance(error, Internal)
    assert error.message == "the net's result is malformed"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "release/../..", ".", "", "no such", 5, "\0"]
)
def test_result_file_outside_the_workspace_is_never_read(script: BlockingSupervisor, path: Any) -> None:
    error = script.ask(do="file", **{"as": path})
    assert isinstance(error, Internal)
    assert error.message == "the net's result is malformed"


@pytest.mark.parametrize(
    "ret", [None, 5, "x", [], {"code": "x"}, {"code": 1.5}, {"code": 2**40}, {"message": 5}, {"code": True}]
)
def test_malformed_ret_gives_code_500(script: BlockingSupervisor, ret: Any) -> None:
    assert isinstance(script.ask(do="ret", ret=ret), Internal)


def test_malformed_ret_fails_only_its_own_request(script: BlockingSupervisor) -> None:
    first, bad, *rest = script.ask_in_one_batch({}, {"do": "nan"}, {}, {})
    assert [result(each) for each in rest] == [result(first)] * 2
    assert isinstance(bad, Internal)


@pytest.mark.parametrize(("code", "status"), [(404, 404), (571, 571), (-3, 400), (7, 500)])
def test_code_of_a_script_reaches_the_caller(script: BlockingSupervisor, code: int, status: int) -> None:
    error = script.ask(do="ret", ret={"code": code, "message": "no face"})
    assert isinstance(error, ServingError)
    assert (error.code, error.status, error.message) == (code, status, "no face")


def test_message_with_a_lone_surrogate_is_sent_with_a_replacement(script: BlockingSupervisor) -> None:
    error = script.ask(do="surrogate")
    assert isinstance(error, ServingError)
    assert error.message == "? odd"


def test_script_refuses_a_request_by_raising(script: BlockingSupervisor) -> None:
    for error, message in ((script.ask(do="refuse"), "too dark"), (script.ask(prepare="refuse"), "no face")):
        assert isinstance(error, InvalidArgument)
        assert error.message == message


def test_preparation_that_exits_gives_code_500(script: BlockingSupervisor) -> None:
    error = script.ask(prepare="exit")
    assert isinstance(error, Internal)
    assert error.message == "the net failed to prepare the request"


@pytest.mark.parametrize("params", ["{", "NaN", '{"a": Infinity}'])
def test_params_that_are_no_json_give_code_400(script: BlockingSupervisor, params: str) -> None:
    error = script.ask(params_json=params)
    assert isinstance(error, InvalidArgument)
    assert error.message == "params is not JSON"


def test_output_of_a_script_is_logged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with started(tmp_path) as script:
        assert isinstance(script.ask(do="print"), InferResponse)
    output = capfd.readouterr()
    assert output.out == ""
    assert '"text":"printed by the script"' in output.err
    assert "written below python" in output.err


def test_net_init_and_net_inference_run_in_the_main_thread(tmp_path: Path) -> None:
    script = "import threading\ndef net_init(cfg): return {'thread': threading.current_thread().name}\n"
    script += "def net_inference(model, args):\n"
    script += "    now = [model['thread'], threading.current_thread().name]\n"
    script += "    return [{'code': 0, 'result': now} for _ in args['reqs']]\n"
    with started(tmp_path, script) as worker:
        assert result(worker.ask()) == ["MainThread", "MainThread"]


@pytest.mark.parametrize(
    ("net_init", "message"),
    [
        ("return {'error': 'no\\n weights'}", "no weights"),
        ("raise OSError('/srv/secret')", "net_init raised OSError, see the log"),
        ("sys.exit(3)", "net_init raised RuntimeError, see the log"),
        ("os._exit(3)", "the net's process ended while the net was loaded"),
        ("time.sleep(1000)", "net_init did not return within 0.2 s"),
        ("from evaluator import scripting; raise scripting.StartError('one\\ntwo')", "one two"),
        ("import numpy; return {'error': numpy.array([1, 2])}", "[1 2]"),
        ("return None", "net_init returned NoneType, should be a dict"),
        ("return {'batch_size': 'x'}", "the batch_size of net_init's model is 'x', should be a positive integer"),
        ("from evaluator import scripting; scripting.net(cfg)", "the release's tar has no deploy.prototxt"),
    ],
)
def test_net_init_that_fails_gives_an_error_of_one_line(net_init: str, message: str, tmp_path: Path) -> None:
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
def test_malformed_script_gives_an_error_of_one_line(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StartError) as error, started(tmp_path, script):
        pass
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("inference", "starts"),
    [
        ("return [{'code': 0, 'result': {}}] * len(args['reqs'])", True),
        ("return [{'code': 400 if isinstance(r['data'], dict) else 0} for r in args['reqs']]", True),
        ("return [open(r['data']['uri'], 'rb').read() and {'code': 0} for r in args['reqs']]", True),
        ("raise ValueError('no attribute')", True),
        ("os._exit(1)", False),
    ],
)
def test_warm_up_fails_the_start_only_if_the_process_ends(inference: str, starts: bool, tmp_path: Path) -> None:
    script = f"import os\ndef net_init(cfg): return {{}}\ndef net_inference(model, args):\n    {inference}\n"
    if starts:
        with started(tmp_path, script, batch_size=2) as worker:
            assert worker.supervisor.plan.batch_size == 2
    else:
        with pytest.raises(StartError, match="the net's process ended while"), started(tmp_path, script, batch_size=2):
            pass


def test_script_is_warmed_up_with_each_batch_size(tmp_path: Path) -> None:
    script = "seen = []\ndef net_init(cfg): return {'batch_size': 6}\ndef net_inference(model, args):\n"
    script += "    seen.append(len(args['reqs']))\n    return [{'code': 0, 'result': seen}] * len(args['reqs'])\n"
    with started(tmp_path, script) as worker:
        assert result(worker.ask()) == [1, 2, 4, 6, 1]


def test_files_of_requests_are_removed(script: BlockingSupervisor, workspace: Path) -> None:
    assert script.pid()
    wait_for(lambda: os.listdir(workspace / "requests") == [])


@pytest.mark.parametrize("value", [0, -1, "5", True, float("inf")])
def test_wrong_script_timeout_fails_to_start(value: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match=r"model_params\.script_timeout_s is .*, should be a positive number"),
        started(tmp_path, model_params={"script_timeout_s": value}),
    ):
        pass


def test_batch_of_large_results_arrives_whole(tmp_path: Path) -> None:
    script = "def net_init(cfg): return {'batch_size': 4}\ndef net_inference(model, args):\n"
    script += "    return [{'code': 0, 'result_file': bytes([n]) * (40 << 20)} for n, _ in enumerate(args['reqs'])]\n"
    with started(tmp_path, script) as worker:
        outcomes = worker.ask_in_one_batch({}, {}, {}, {})
    streams = [outcome.stream for outcome in outcomes if isinstance(outcome, InferResponse)]
    assert [len(stream) for stream in streams] == [40 << 20] * 4
    assert sorted(stream[0] for stream in streams) == [0, 1, 2, 3]
