"""`atserving convert`, as its user meets it."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from evaluator.caffe import cli, convert

from .nets import FIXTURES, caffemodel, input_layer, layer, normal, run, write_net

ROOT = Path(__file__).parents[2]
NET = (
    'name: "tiny"\n'
    + input_layer(1, 3, 8, 8)
    + layer("Convolution", tops="c", more="convolution_param { num_output: 4 kernel_size: 3 }")
)
NET += layer("ReLU", "c", "c") + layer("Softmax", "c", "prob")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.convert, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def net(tmp_path: Path) -> tuple[Path, Path]:
    return write_net(tmp_path / "in", NET)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_net_is_written_and_summarized(net: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*net, "-o", tmp_path / "out.onnx")
    assert (done.exit_code, done.stderr) == (0, "")
    assert onnx.load(tmp_path / "out.onnx") == convert(*net)
    lines = {line.strip() for line in done.stdout.splitlines()}
    size = (tmp_path / "out.onnx").stat().st_size
    for said in (
        "inputs        data (N, 3, 8, 8)",
        "outputs       prob (N, 4, 6, 6)",
        "layers        3, as 3 nodes",
        "parameters    112",
        "multiply-adds 3,888 an image",
        "opset         22",
        f"size          {size:,} bytes",
    ):
        assert said in lines
    assert left_in(tmp_path) == ["out.onnx"]


def test_output_is_net_onnx_in_the_working_folder_unless_it_is_named(
    net: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(*net).exit_code == 0
    assert left_in(tmp_path) == ["net.onnx"]


def test_json_says_all_that_the_summary_says(net: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*net, "-o", tmp_path / "out.onnx", "--json")
    said = json.loads(done.stdout)
    assert said["output"] == str(tmp_path / "out.onnx")
    assert (said["inputs"], said["outputs"]) == ({"data": ["N", 3, 8, 8]}, {"prob": ["N", 4, 6, 6]})
    assert (said["layers"], said["parameters"], said["multiply_adds"], said["opset"]) == (3, 112, 3888, 22)
    assert said["size"] == (tmp_path / "out.onnx").stat().st_size
    assert [node["op"] for node in said["nodes"]] == ["Conv", "Relu", "Softmax"]
    assert "verification" not in said


def test_further_outputs_and_an_open_size_can_be_had(net: tuple[Path, Path], tmp_path: Path) -> None:
    said = json.loads(invoke(*net, "-o", tmp_path / "o", "--json", "--add-output", "c", "--dynamic-size").stdout)
    assert said["inputs"] == {"data": ["N", 3, "H", "W"]}
    assert list(said["outputs"]) == ["prob", "c"]


def test_net_that_cannot_be_converted_is_one_line_and_the_old_output_stays(
    net: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "out.onnx").write_text("the old one")
    net[0].write_text(NET.replace("Softmax", "Mys\\033[31mtery"))
    done = invoke(*net, "-o", tmp_path / "out.onnx")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("atserving convert: layer 'the_Mys")
    assert done.stderr.count("\n") == 1
    assert "\033" not in done.stderr
    assert (tmp_path / "out.onnx").read_text() == "the old one"
    assert left_in(tmp_path) == ["out.onnx"]


def test_what_cannot_be_read_or_written_is_one_line(net: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, said in (
        ((net[0], tmp_path / "none"), "none: cannot be read: No such file or directory"),
        ((*net, "-o", tmp_path / "no" / "out.onnx"), "No such file or directory"),
        ((*net, "-o", tmp_path), "is a folder"),
        ((*net, "-o", net[1]), "weight.caffemodel: is to be converted"),
        ((*net, "--add-output", "fc7", "-o", tmp_path / "o"), "has no blob 'fc7'"),
    ):
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1), said
        assert said in done.stderr
    assert left_in(tmp_path) == []
    assert invoke(net[0]).exit_code == 2
    assert invoke(*net, "--fast").exit_code == 2


def test_writing_that_fails_leaves_the_old_output_and_nothing_else(
    net: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.onnx").write_text("the old one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = invoke(*net, "-o", tmp_path / "out.onnx")
    assert (done.exit_code, done.stderr) == (1, f"atserving convert: {tmp_path}/out.onnx: No space left on device\n")
    assert (tmp_path / "out.onnx").read_text() == "the old one"
    assert left_in(tmp_path) == ["out.onnx"]


def test_output_has_the_rights_of_any_new_file_and_a_link_stays_one(net: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    (tmp_path / "plain").write_text("")
    assert invoke(*net, "-o", tmp_path / "link.onnx").exit_code == 0
    assert (tmp_path / "link.onnx").is_symlink()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "real.onnx")}
    assert len(modes) == 1


def test_verify_compares_with_opencv_output_by_output(tmp_path: Path) -> None:
    case = FIXTURES / "slice_even3"
    said = json.loads(
        invoke(case / "deploy.prototxt", case / "weight.caffemodel", "-o", tmp_path / "o", "--verify", "--json").stdout
    )
    oracles = {one["oracle"].split()[0]: one for one in said["verification"]["oracles"]}
    assert oracles["OpenCV"]["status"] == "agrees"
    assert all(output["difference"] < 1e-5 and output["agrees"] for output in oracles["OpenCV"]["outputs"])
    assert [output["output"] for output in oracles["OpenCV"]["outputs"]] == list(said["outputs"])


def test_verify_says_which_oracle_cannot_judge_a_net_and_why(tmp_path: Path) -> None:
    for case, reason in (
        ("ip_transpose", "OpenCV is no oracle for this net: layer 'out_innerproduct': it leaves out transpose"),
        ("reduce_sum", "could not run the net: cv2.error: OpenCV(4"),
    ):
        done = invoke(
            FIXTURES / case / "deploy.prototxt", FIXTURES / case / "weight.caffemodel", "-o", tmp_path / "o", "--verify"
        )
        assert done.exit_code == 0
        assert reason in done.stdout
        assert "there is no oracle to compare it with" in done.stdout


@pytest.mark.parametrize(
    ("prototxt", "reason"),
    [
        (
            input_layer(2, 5) + input_layer(2, name="label") + layer("SoftmaxWithLoss", "data label", "loss"),
            "Caffe is no oracle for this net: layer 'the_SoftmaxWithLoss': it gives the loss",
        ),
        (
            input_layer(1, 3, 12, 12)
            + layer("PriorBox", "data data", more="prior_box_param { min_size: 4 clip: false img_size: 30 }"),
            "OpenCV is no oracle for this net: layer 'the_PriorBox': it leaves out img_size",
        ),
    ],
)
def test_verify_does_not_ask_what_is_answered_otherwise(prototxt: str, reason: str, tmp_path: Path) -> None:
    body = GIVES.format("np.float32(0)") if "Caffe" in reason else "sys.exit(3)"
    oracle = engine(tmp_path, body)
    done = invoke(*write_net(tmp_path, prototxt, {}), "-o", tmp_path / "o", "--verify", "--caffe-python", oracle)
    assert (done.exit_code, "DISAGREES" in done.stdout) == (0, False)
    assert reason in done.stdout


def engine(folder: Path, body: str) -> Path:
    """An interpreter whose Caffe does as the test says."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys\nimport numpy as np\nos.chdir(sys.argv[2])\n{body}\n")
    path.chmod(0o755)
    return path


GIVES = "np.save('out_0.npy', {}.astype('f4'))\nopen('version', 'w').write('1')"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (GIVES.format("np.full((1, 4, 6, 6), .25)"), "DISAGREES"),
        (GIVES.format("np.ones((1, 4, 6))"), "it has the shape [1, 4, 6, 6], and the oracle's [1, 4, 6]"),
        (GIVES.format("np.full((1, 4, 6, 6), np.nan)"), "one has numbers where the other has none"),
        ("open('version', 'w').write('1')", "the oracle does not have it"),
    ],
    ids=["numbers", "shape", "nan", "missing"],
)
def test_verify_fails_where_an_oracle_disagrees(body: str, said: str, net: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*net, "-o", tmp_path / "o", "--verify", "--caffe-python", engine(tmp_path, body))
    assert done.exit_code == 1
    assert "Caffe 1 disagrees" in done.stdout
    assert said in done.stdout


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "Caffe could not run the net: it was ended by signal 11"),
        (
            "print('F0101 1 net.cpp:9] Check failed: x\\n*** stack ***', file=sys.stderr); os.abort()",
            "Caffe could not run the net: Check failed: x",
        ),
        ("sys.exit(3)", "Caffe is not installed"),
    ],
    ids=["crash", "check", "missing"],
)
def test_verify_survives_an_oracle_that_does_not(body: str, said: str, net: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*net, "-o", tmp_path / "o", "--verify", "--caffe-python", engine(tmp_path, body))
    assert done.exit_code == 0
    assert said in done.stdout
    assert "OpenCV 4" in done.stdout


def test_verify_feeds_regions_that_lie_within_the_image(tmp_path: Path) -> None:
    prototxt = input_layer(1, 3, 12, 16) + input_layer(5, 5, name="rois")
    prototxt += layer("ROIPooling", "data rois", more="roi_pooling_param { pooled_h: 2 pooled_w: 2 }")
    done = invoke(*write_net(tmp_path / "in", prototxt, {}), "-o", tmp_path / "o", "--verify")
    assert done.exit_code == 0
    assert "rois (8, 5)" in done.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """More bytes than are converted without a bar."""
    prototxt = input_layer(1, 3, 38, 38) + layer("InnerProduct", more="inner_product_param { num_output: 1000 }")
    return write_net(tmp_path_factory.mktemp("large"), prototxt)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "evaluator.caffe", *map(str, arguments)]


def test_large_net_has_a_progress_bar_on_a_terminal(large: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        command(*large, "-o", tmp_path / "o"), stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, check=True
    )
    shown = os.read(ours, 2**16).decode()
    os.close(ours)
    os.close(theirs)
    assert "100%" in shown
    assert "weight.caffemodel" in shown
    assert b"opset         22" in done.stdout


def test_there_is_no_progress_bar_elsewhere(large: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess.run(command(*large, "-o", tmp_path / "o"), capture_output=True, cwd=ROOT, check=True)
    assert done.stderr == b""


def test_library_tells_its_progress(large: tuple[Path, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    convert(*large, progress=lambda *step: told.append(step))
    assert told[0] == ("reading", 0, 1)
    assert [step for step in told if step[1] == step[2]] == [("reading", 1, 1), ("layers", 1, 1), ("weights", 3, 3)]


def test_command_is_one_of_atserving(net: tuple[Path, Path], tmp_path: Path) -> None:
    atserving = Path(sys.executable).parent / "atserving"
    done = subprocess.run(
        [atserving, "convert", *net, "-o", tmp_path / "o"], capture_output=True, check=True, text=True
    )
    assert "prob (N, 4, 6, 6)" in done.stdout


def test_written_file_gives_the_answers_of_the_library(tmp_path: Path) -> None:
    weights: dict[str, list[Any]] = {"the_InnerProduct": [normal(5, 12), normal(5)]}
    paths = write_net(
        tmp_path / "in",
        input_layer(1, 12) + layer("InnerProduct", more="inner_product_param { num_output: 5 }"),
        weights,
    )
    assert paths[1].read_bytes() == caffemodel(weights)
    invoke(*paths, "-o", tmp_path / "o")
    data = {"data": normal(3, 12)}
    assert np.array_equal(run(onnx.load(tmp_path / "o"), data)["out"], run(convert(*paths), data)["out"])
