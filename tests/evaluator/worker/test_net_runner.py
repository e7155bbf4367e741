"""The net runner checks and encodes the rets of a net, and hides the details of its failures."""

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from atserving.errors import Internal, InvalidArgument, NetError, ServingError, StartError
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req
from evaluator.worker.net_runner import NetRunner, Prepared, Result
from evaluator.worker.script import Model, Script


@dataclass
class Measurement:
    number: float


def runner(workspace: Path, inference: Any, *, init: Any = None, preprocess: Any = None) -> NetRunner:
    script = Script(init or (lambda _: {"error": "", "batch_size": 2}), inference, preprocess)
    return NetRunner(script, NetConfig({}, workspace=workspace))


def outcome(workspace: Path, ret: Any) -> Result | ServingError:
    return runner(workspace, lambda model, args: [ret]).infer([Prepared("r", {})])[0]


def test_net_gets_the_batch_in_order(tmp_path: Path) -> None:
    def inference(model: Model, args: dict[str, Any]) -> list[dict[str, Any]]:
        assert args["reqid"] == "a,b"
        return [{"code": 0, "message": "", "result": req} for req in args["reqs"]]

    results = runner(tmp_path, inference).infer([Prepared("a", {"n": 1}), Prepared("b", {"n": 2})])
    assert results == [Result("", b'{"n":1}'), Result("", b'{"n":2}')]


def test_result_is_json_or_bytes_or_a_file_of_the_workspace(tmp_path: Path) -> None:
    (tmp_path / "out.bin").write_bytes(b"\x00\x01")
    assert outcome(tmp_path, {"code": 0, "message": "hi", "result": None}) == Result("hi", b"null")
    assert outcome(tmp_path, {"result": {"x": np.float32(1.5), "y": np.arange(2)}}) == Result(
        "", b'{"x":1.5,"y":[0,1]}'
    )
    assert outcome(tmp_path, {"code": 0, "result_file": b"raw"}) == Result("", stream=b"raw")
    assert outcome(tmp_path, {"code": 0, "result_file": str(tmp_path / "out.bin")}) == Result("", stream=b"\x00\x01")
    # The runner removes a result file after reading it.
    assert not (tmp_path / "out.bin").exists()


def test_integers_of_any_size_are_kept(tmp_path: Path) -> None:
    result = {"x": [2**64, -(2**70)], "y": np.arange(2), "z": np.float32(1.5), "m": Measurement(1.0), "t": "ü"}
    expected = '{"x":[18446744073709551616,-1180591620717411303424],"y":[0,1],"z":1.5,"m":{"number":1.0},"t":"ü"}'
    assert outcome(tmp_path, {"result": result}) == Result("", expected.encode())


@pytest.mark.parametrize(
    ("code", "status"),
    [(400, 400), (415, 415), (571, 571), (599, 599), (-1, 400), (-2, 500), (-3, 400), (7, 500), (700, 500)],
)
def test_nets_own_code_is_kept_and_maps_to_a_status(code: int, status: int, tmp_path: Path) -> None:
    error = outcome(tmp_path, {"code": code, "message": "bad face"})
    assert isinstance(error, NetError)
    assert (error.code, error.status, error.message) == (code, status, "bad face")


@pytest.mark.parametrize(
    "ret",
    [
        None,
        [],
        {"code": "0", "result": {}},
        {"code": True},
        {"code": 0, "message": 5},
        {"code": 0, "result": {"x": float("nan")}},
        {"code": 0, "result": [None, {"x": [np.float32("inf")]}]},
        {"code": 0, "result": {"x": object()}},
        {"code": 0, "result": {1: 2}},
        {"code": 0, "result": Measurement(float("nan"))},
        {"code": 0, "result": {"x": 2**70, "y": float("nan")}},
        {"code": 0, "result": {"x": 2**70, "y": object()}},
        {"code": 0, "result_file": "/etc/passwd"},
        {"code": 0, "result_file": "../outside"},
        {"code": 0, "result_file": 5},
    ],
)
def test_malformed_ret_gives_code_500_without_details(ret: Any, tmp_path: Path) -> None:
    error = outcome(tmp_path, ret)
    assert isinstance(error, Internal)
    assert error.message == "the net's result is malformed"


@pytest.mark.parametrize("rets", [None, [], [{}] * 3, ({}, {})])
def test_wrong_number_of_rets_fails_the_batch(rets: Any, tmp_path: Path) -> None:
    with pytest.raises(Internal, match="the net did not return one result a request"):
        runner(tmp_path, lambda model, args: rets).infer([Prepared("a", {}), Prepared("b", {})])


def test_error_of_a_net_exception_has_no_paths_or_traces(tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("in /srv/secret/net.py")

    broken = runner(tmp_path, fail, preprocess=fail)
    with pytest.raises(Internal) as inference:
        broken.infer([Prepared("a", {})])
    with pytest.raises(Internal) as preparation:
        broken.prepare("a", {})
    assert (inference.value.message, preparation.value.message) == (
        "the forward pass failed",
        "the net failed to prepare the request",
    )


def test_error_that_preprocess_raises_reaches_the_caller(tmp_path: Path) -> None:
    def refuse(model: Model, req: Req) -> Req:
        raise InvalidArgument("no face")

    with pytest.raises(InvalidArgument, match="no face"):
        runner(tmp_path, lambda *_: [], preprocess=refuse).prepare("a", {})


def test_net_init_that_fails_is_a_start_error(tmp_path: Path) -> None:
    def raises(_: Any) -> Model:
        raise OSError("/srv/secret")

    with pytest.raises(StartError, match="no weights"):
        runner(tmp_path, lambda *_: [], init=lambda _: {"error": "no weights"})
    with pytest.raises(StartError, match="net_init raised OSError, see the log"):
        runner(tmp_path, lambda *_: [], init=raises)


class Kept(dict[str, Any]):
    """A request whose end can be seen."""


@pytest.mark.parametrize("stage", ["prepare", "infer"])
def test_an_error_of_the_net_keeps_no_request(tmp_path: Path, stage: str) -> None:
    def fail(*_: object) -> Any:
        raise InvalidArgument("no face")

    failing = runner(tmp_path, fail, preprocess=fail)
    messages = []
    gc.collect()
    gc.disable()
    try:
        req = Kept()
        kept = weakref.ref(req)
        try:
            failing.prepare("r", cast(Req, req)) if stage == "prepare" else failing.infer([Prepared("r", req)])
        except InvalidArgument as error:
            messages.append(error.message)
        del req
        assert messages == ["no face"]
        assert kept() is None
    finally:
        gc.enable()
