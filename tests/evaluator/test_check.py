"""`python -m evaluator check` reports how a release loads and replies, or why it does not, without a mesh."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import orjson
import pytest

from atserving.errors import StartError
from atserving.local.examples import ROOT
from atserving.uris import decode_data
from evaluator.check import CheckOptions, check
from tests.evaluator.digits import DIGITS, digits_tar

SEVEN = DIGITS / "images" / "7.png"


def tar(folder: Path, script: str) -> Path:
    digits_tar(folder / "release.tar", **{"net.py": script.encode()})
    return folder / "release.tar"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "evaluator", "check", *(str(argument) for argument in arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_report_has_the_net_the_plan_the_result_and_the_times(tmp_path: Path) -> None:
    process = command(DIGITS / "digits-v1.tar", "--image", SEVEN, "--batch-size", 4, "--params", '{"limit": 2}')
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert lines[0].startswith("classify on CPU, loaded in ")
    assert lines[1].startswith("batch size 4, ")
    assert lines[2] == "7.png:"
    assert [line.split() for line in lines[3:5]] == [["index", "class", "score"], ["7", "seven", "0.999995"]]
    assert lines[5].startswith("  3      three  0.00000")
    assert [line.split(":")[0] for line in lines[6:]] == ["prepare", "batch of 1", "batch of 4", "peak memory"]


def test_options_give_custom_files_and_model_params(tmp_path: Path) -> None:
    (tmp_path / "tags.txt").write_text("cat")
    script = "def net_init(cfg):\n    return {'tags': open(cfg['custom_files']['taglist_file']).read(), **cfg}\n"
    script += "def net_inference(model, args):\n"
    script += "    return [{'result': [model['tags'], model['model_params']['x']]} for _ in args['reqs']]\n"
    arguments = ["--custom-file", f"taglist_file={tmp_path / 'tags.txt'}", "--model-params", '{"x": 5}', "--json"]
    process = command(tar(tmp_path, script), *arguments)
    assert orjson.loads(process.stdout)["answers"][0]["result"] == ["cat", 5]
    assert command(tar(tmp_path, script), "--custom-file", "taglist_file=none").returncode == 2


def test_json_option_prints_the_report_as_json() -> None:
    process = command(
        DIGITS / "digits-v1.tar", "--net", "feature", "--custom-values", '{"layers": ["pool2"]}', "--json"
    )
    report = orjson.loads(process.stdout)
    (answer,) = report["answers"]
    assert answer["request"] == "a made-up image"
    assert len(decode_data(answer["result"])) == 40
    assert set(report["by_batch_ms"]) == {"1", str(report["plan"]["batch_size"])}
    assert report["plan"]["engines"] * report["plan"]["threads"] >= 1
    assert report["peak_memory_mib"] > 10


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([DIGITS / "digits-v1.tar", "--net", "guess"], 1, "evaluator check: custom_values.net is 'guess'"),
        ([DIGITS / "digits-v1.tar", "--custom-values", "[1]"], 2, "--custom-values should be a JSON object"),
        (["no-such.tar"], 2, "does not exist"),
    ],
)
def test_error_is_printed_as_one_line_with_an_exit_status(arguments: list[Any], status: int, message: str) -> None:
    process = command(*arguments)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (status, "", 1)
    assert message in process.stderr


SCRIPT = """
from evaluator import scripting

def net_init(cfg):
    net = scripting.net(cfg)
    return {"net": net, "transformer": scripting.transformer(cfg, net.blobs["data"].shape), "batch_size": 2,
            "names": scripting.labels(cfg["tar_files"]["labels.csv"])}

def net_preprocess(model, req):
    data = req["data"] if isinstance(req["data"], list) else [req["data"]]
    return {"inputs": [model["transformer"](scripting.read_image(each["body"])) for each in data]}

def net_inference(model, args):
    rets = []
    for req in args["reqs"]:
        names = []
        for planes in req["inputs"]:
            model["net"].blobs["data"].data[...] = planes
            best = int(model["net"].forward()["prob"].argmax())
            assert best == model["net"].forward({"data": planes[None]})["prob"].argmax()
            names.append(model["names"][best])
        rets.append({"code": 0, "message": "", "result": {"names": names}})
    return rets
"""


async def test_script_runs_the_net_of_its_release(tmp_path: Path) -> None:
    report = await check(CheckOptions(tar(tmp_path, SCRIPT), {}, [SEVEN, DIGITS / "images" / "1.png"]))
    assert (report.net, report.plan.batch_size) == ("net.py", 2)
    assert [answer.result for answer in report.answers] == [{"names": ["seven"]}, {"names": ["one"]}]
    assert list(report.by_batch_ms) == [1, 2]


async def test_script_of_the_documentation_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "write-a-net.md").read_text()
    block = page[page.index("    import numpy") : page.index("| function | when |")]
    report = await check(CheckOptions(tar(tmp_path, textwrap.dedent(block)), {}, [SEVEN]))
    assert [answer.result for answer in report.answers] == [{"best": 7}]


async def test_group_option_sends_all_images_as_one_group(tmp_path: Path) -> None:
    images = [SEVEN, DIGITS / "images" / "1.png"]
    report = await check(CheckOptions(tar(tmp_path, SCRIPT), {}, images, group=True))
    assert [(each.request, each.result) for each in report.answers] == [
        ("7.png, 1.png, a group", {"names": ["seven", "one"]})
    ]


async def test_script_that_refuses_single_images_gets_a_group(tmp_path: Path) -> None:
    script = "def net_init(cfg): return {}\ndef net_inference(model, args):\n"
    script += "    return [{'code': 0 if isinstance(r['data'], list) else 400} for r in args['reqs']]\n"
    (answer,) = (await check(CheckOptions(tar(tmp_path, script), {}))).answers
    assert (answer.request, answer.result) == ("a group of two made-up images", None)


@pytest.mark.parametrize(
    ("ret", "message"),
    [
        ("[{'code': 400, 'message': 'no face'}] * len(args['reqs'])", "a made-up image: code 400: no face"),
        ("[]", "a made-up image: code 500: the net did not return one result a request"),
        ("1 / 0", "a made-up image: code 500: the forward pass failed"),
        ("[{}] if len(args['reqs']) == 1 else []", "a batch of 2 requests failed, though each alone does not"),
    ],
)
async def test_script_without_a_result_for_each_request_fails_the_check(ret: str, message: str, tmp_path: Path) -> None:
    script = f"def net_init(cfg): return {{}}\ndef net_inference(model, args): return {ret}\n"
    with pytest.raises(StartError) as error:
        await check(CheckOptions(tar(tmp_path, script), {"batch_size": 2}))
    assert message in str(error.value)


async def test_error_names_the_malformed_field_or_image(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="the release is malformed: use_device"):
        await check(CheckOptions(DIGITS / "digits-v1.tar", {"use_device": "TPU"}))
    with pytest.raises(StartError, match=r"release\.tar: code 400: the image can't be decoded"):
        await check(CheckOptions(DIGITS / "digits-v1.tar", {}, [tar(tmp_path, "")]))
    with pytest.raises(StartError, match=r"none\.png: No such file"):
        await check(CheckOptions(DIGITS / "digits-v1.tar", {}, [Path("none.png")]))
