"""A release is checked as an instance would load it, and its script is not run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from atserving.config import Release, validate
from atserving.errors import StartError
from evaluator.release_check import Checked, check_release
from tests.evaluator.digits import DIGITS as FOLDER
from tests.evaluator.digits import digits_tar

DIGITS = FOLDER / "digits-v1.tar"
URI = DIGITS.as_uri()
SCRIPT = b"def net_init(cfg):\n    raise SystemExit\n\ndef net_inference(model, args):\n    return []\n"


def check(file: str = URI, **fields: Any) -> Checked:
    return check_release(validate(Release, {"name": "app", "version": "v1", "file": file, **fields}))


def test_the_digests_of_all_files_are_found(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_bytes(b"own")
    found = check(custom_files={"own": own.as_uri()})
    assert found == Checked(
        {
            "file": hashlib.sha256(DIGITS.read_bytes()).hexdigest(),
            "custom_files.own": hashlib.sha256(b"own").hexdigest(),
        },
        [],
    )


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        (
            {"custom_values": {"inputscale": 1, "max_bytes": 9}},
            "custom_values: unknown field 'inputscale', did you mean",
        ),
        ({"custom_values": {"raw_scale": 1, "net": "classify"}}, ""),
        ({"custom_values": {"threshold": 0.4}}, "custom_values: unknown field 'threshold'"),
        ({"model_params": {"engins": 1, "memory_mib": 900}}, "model_params: unknown field 'engins', did you mean 'eng"),
        ({"use_device": "GPU", "model_params": {"fp16": True, "tf32": False, "tensorrt": False}}, ""),
    ],
)
def test_options_that_the_net_does_not_read_are_named(fields: dict[str, Any], warning: str) -> None:
    assert [each.startswith(warning) for each in check(**fields).warnings] == [True] * bool(warning)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"file": "file:///none.tar"}, "file file:///none.tar: there is no such file"),
        ({"file": "http://127.0.0.1:9/x.tar"}, "file http://127.0.0.1:9/x.tar: can't be fetched: ClientConnectorError"),
        ({"file": URI + "#sha256=" + "0" * 64}, "its sha256 is "),
        ({"file": Path(__file__).as_uri()}, "the release's tar is refused: not an uncompressed tar, or cut short"),
        ({"custom_values": {"net": "klassify"}}, "custom_values.net is 'klassify', did you mean 'classify'?"),
        ({"custom_values": {"net": 3}}, "custom_values.net is 3; the built-in nets are: "),
        ({"custom_values": {"net": "detect"}}, "detect takes nets that end in a DetectionOutput"),
        ({"custom_values": {"max_bytes": -1}}, "custom_values.max_bytes is -1, should be a positive integer"),
        ({"model_params": {"engines": 0}}, "model_params.engines is 0, should be a positive integer"),
        ({"model_params": {"script_timeout_s": "2s"}}, "model_params.script_timeout_s is '2s', should be a positive"),
        ({"custom_files": {"a": "file:///none"}}, "custom_files.a file:///none: there is no such file"),
    ],
)
def test_what_can_not_work_is_an_error(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(StartError) as caught:
        check(**fields)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({"net.py": SCRIPT}, ""),
        ({"net.py": b"from shared import *\n"}, ""),
        ({"net.py": b"import shared\nnet_init, net_inference = shared.both\n", "deploy.prototxt": None}, ""),
        ({"net.py": SCRIPT.replace(b"net_inference", b"net_infer")}, "net.py has no function net_inference"),
        ({"net.py": b"def net_init(cfg:\n"}, "net.py, line 1: "),
        ({"net.py": b"a = '\0'\n"}, "net.py, line 1: "),
        ({"deploy.prototxt": None}, "the release's tar has no deploy.prototxt"),
        ({"deploy.prototxt": b"layer {"}, "the net can't be converted: "),
        ({"labels.csv": b"index,name\n0,cat\n"}, "labels.csv: line 1 is a header"),
    ],
)
def test_the_members_are_read_and_a_script_is_not_run(
    tmp_path: Path, members: dict[str, bytes | None], error: str
) -> None:
    file = digits_tar(tmp_path / "a.tar", **members)
    if not error:
        assert check(file).warnings == []
        return
    with pytest.raises(StartError) as caught:
        check(file)
    assert error in str(caught.value)
