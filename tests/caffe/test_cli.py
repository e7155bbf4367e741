"""The command `atserving convert`: files, output, exit status, and --verify."""

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


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_net_is_written_and_summarized(net: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*net, "-o", tmp_path / "out.onnx")
    assert (done.exit_code, done.stderr) == (0, "")
    assert onnx.load(tmp_path / "out.onnx") == convert(*net)
    lines = {line.strip() for line in done.stdout.splitlines()}
    size = (tmp_path / "out.onnx").stat().st_size
    for line in (
        "inputs        data (N, 3, 8, 8)",
        "outputs       prob (N, 4, 6, 6)",
        "layers        3, as 3 ONNX nodes",
        "parameters    112",
        "multiply-adds 3,888 per image",
        "opset         22",
        f"size          {size:,} bytes",
    ):
        assert line in lines
    assert files_in(tmp_path) == ["out.onnx"]


def test_default_output_is_net_onnx_in_the_working_folder(
    net: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(*net).exit_code == 0
    assert files_in(tmp_path) == ["net.onnx"]


def test_json_contains_the_whole_summary(net: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*net, "-o", tmp_path / "out.onnx", "--json")
    report = json.loads(done.stdout)
    assert report["output"] == str(tmp_path / "out.onnx")
    assert (report["inputs"], report["outputs"]) == ({"data": ["N", 3, 8, 8]}, {"prob": ["N", 4, 6, 6]})
    assert (report["layers"], report["parameters"], report["multiply_adds"], report["opset"]) == (3, 112, 3888, 22)
    assert report["size"] == (tmp_path / "out.onnx").stat().st_size
    assert [node["op"] for node in report["nodes"]] == ["Conv", "Relu", "Softmax"]
    assert "verification" not in report


def test_options_add_outputs_and_keep_the_size_symbolic(net: tuple[Path, Path], tmp_path: Path) -> None:
    report = json.loads(invoke(*net, "-o", tmp_path / "o", "--json", "--add-output", "c", "--dynamic-size").stdout)
    assert report["inputs"] == {"data": ["N", 3, "H", "W"]}
    assert list(report["outputs"]) == ["prob", "c"]


def test_failed_conversion_prints_one_line_and_keeps_the_old_output(net: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_text("old")
    net[0].write_text(NET.replace("Softmax", "Mys\\033[31mtery"))
    done = invoke(*net, "-o", tmp_path / "out.onnx")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("atserving convert: layer 'the_Mys")
    assert done.stderr.count("\n") == 1
    assert "\033" not in done.stderr
    assert (tmp_path / "out.onnx").read_text() == "old"
    assert files_in(tmp_path) == ["out.onnx"]


def test_file_error_prints_one_line(net: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, message in (
        ((net[0], tmp_path / "none"), "none: cannot be read: No such file or directory"),
        ((*net, "-o", tmp_path / "no" / "out.onnx"), "No such file or directory"),
        ((*net, "-o", tmp_path), "is a folder"),
        ((*net, "-o", net[1]), "weight.caffemodel: is an input"),
        ((*net, "--add-output", "fc7", "-o", tmp_path / "o"), "has no blob 'fc7'"),
    ):
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1), message
        assert message in done.stderr
    assert files_in(tmp_path) == []
    assert invoke(net[0]).exit_code == 2
    assert invoke(*net, "--fast").exit_code == 2


def test_failed_write_keeps_the_old_output_and_no_temporary_file(
    net: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.onnx").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = invoke(*net, "-o", tmp_path / "out.onnx")
    assert (done.exit_code, done.stderr) == (1, f"atserving convert: {tmp_path}/out.onnx: No space left on device\n")
    assert (tmp_path / "out.onnx").read_text() == "old"
    assert files_in(tmp_path) == ["out.onnx"]


def test_output_has_the_mode_of_a_new_file_and_a_link_stays_a_link(net: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    (tmp_path / "plain").write_text("")
    assert invoke(*net, "-o", tmp_path / "link.onnx").exit_code == 0
    assert (tmp_path / "link.onnx").is_symlink()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "real.onnx")}
    assert len(modes) == 1


def test_verify_compares_every_output_with_opencv(tmp_path: Path) -> None:
    case = FIXTURES / "slice_even3"
    report = json.loads(
        invoke(case / "deploy.prototxt", case / "weight.caffemodel", "-o", tmp_path / "o", "--verify", "--json").stdout
    )
    oracles = {one["oracle"].split()[0]: one for one in report["verification"]["oracles"]}
    assert oracles["OpenCV"]["status"] == "agrees"
    assert all(output["difference"] < 1e-5 and output["agrees"] for output in oracles["OpenCV"]["outputs"])
    assert [output["output"] for output in oracles["OpenCV"]["outputs"]] == list(report["outputs"])


def test_verify_reports_why_an_oracle_cannot_judge_a_net(tmp_path: Path) -> None:
    for case, reason in (
        ("ip_transpose", "OpenCV cannot judge this net: layer 'out_innerproduct': it ignores transpose"),
        ("reduce_sum", "could not run the net: cv2.error: OpenCV(4"),
    ):
        done = invoke(
            FIXTURES / case / "deploy.prototxt", FIXTURES / case / "weight.caffemodel", "-o", tmp_path / "o", "--verify"
        )
        assert done.exit_code == 0
        assert reason in done.stdout
        assert "no oracle could run this net" in done.stdout


@pytest.mark.parametrize(
    ("prototxt", "reason"),
    [
        (
            input_layer(2, 5) + input_layer(2, name="label") + layer("SoftmaxWithLoss", "data label", "loss"),
            "Caffe cannot judge this net: layer 'the_SoftmaxWithLoss': it returns the loss",
        ),
        (
            input_layer(1, 3, 12, 12)
            + layer("PriorBox", "data data", more="prior_box_param { min_size: 4 clip: false img_size: 30 }"),
            "OpenCV cannot judge this net: layer 'the_PriorBox': it ignores img_size",
        ),
    ],
    ids=["Caffe", "OpenCV"],
)
def test_verify_skips_an_oracle_with_a_known_difference(prototxt: str, reason: str, tmp_path: Path) -> None:
    body = RETURN.format("np.float32(0)") if "Caffe" in reason else "sys.exit(3)"
    oracle = caffe_python(tmp_path, body)
    done = invoke(*write_net(tmp_path, prototxt, {}), "-o", tmp_path / "o", "--verify", "--caffe-python", oracle)
    assert (done.exit_code, "DISAGREES" in done.stdout) == (0, False)
    assert reason in done.stdout


def caffe_python(folder: Path, body: str) -> Path:
    """Write an interpreter that runs `body` instead of Caffe."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys\nos.chdir(sys.argv[2])\n{body}\n")
    path.chmod(0o755)
    return path


RETURN = "import numpy as np\nnp.save('out_0.npy', {}.astype('f4'))\nopen('version', 'w').write('1')"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (RETURN.format("np.full((1, 4, 6, 6), .25)"), "DISAGREES"),
        (RETURN.format("np.ones((1, 4, 6))"), "its shape is [1, 4, 6, 6], the oracle's is [1, 4, 6]"),
        (RETURN.format("np.full((1, 4, 6, 6), np.nan)"), "one is NaN or infinite where the other is finite"),
        ("open('version', 'w').write('1')", "the oracle has no such output"),
    ],
    ids=["numbers", "shape", "nan", "missing"],
)
def test_verify_fails_if_an_oracle_disagrees(body: str, message: str, tmp_path: Path) -> None:
    # OpenCV does not run this net, which saves a process: it ignores beta of Swish.
    net = write_net(tmp_path / "in", NET.replace('"ReLU"', '"Swish" swish_param { beta: 2 }'))
    done = invoke(*net, "-o", tmp_path / "o", "--verify", "--caffe-python", caffe_python(tmp_path, body))
    assert done.exit_code == 1
    assert "Caffe 1 disagrees" in done.stdout
    assert message in done.stdout


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "Caffe could not run the net: killed by signal 11"),
        (
            "print('F0101 1 net.cpp:9] Check failed: x\\n*** stack ***', file=sys.stderr); os.abort()",
            "Caffe could not run the net: Check failed: x",
        ),
        ("sys.exit(3)", "Caffe is not installed"),
    ],
    ids=["crash", "check", "missing"],
)
def test_verify_survives_the_failure_of_an_oracle(
    body: str, message: str, net: tuple[Path, Path], tmp_path: Path
) -> None:
    done = invoke(*net, "-o", tmp_path / "o", "--verify", "--caffe-python", caffe_python(tmp_path, body))
    assert done.exit_code == 0
    assert message in done.stdout
    assert "OpenCV 4" in done.stdout


def test_verify_feeds_regions_inside_the_image(tmp_path: Path) -> None:
    prototxt = input_layer(1, 3, 12, 16) + input_layer(5, 5, name="rois")
    prototxt += layer("ROIPooling", "data rois", more="roi_pooling_param { pooled_h: 2 pooled_w: 2 }")
    done = invoke(*write_net(tmp_path / "in", prototxt, {}), "-o", tmp_path / "o", "--verify")
    assert done.exit_code == 0
    assert "rois (8, 5)" in done.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a net that is large enough for a progress bar."""
    prototxt = input_layer(1, 3, 38, 38) + layer("InnerProduct", more="inner_product_param { num_output: 1000 }")
    return write_net(tmp_path_factory.mktemp("large"), prototxt)


def test_large_net_shows_a_progress_bar_on_a_terminal(large: tuple[Path, Path], tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    command: list[str | Path] = [sys.executable, "-m", "evaluator.caffe", *large, "-o", tmp_path / "o"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, cwd=ROOT, check=True)
    shown = os.read(screen, 2**16).decode()
    os.close(screen)
    os.close(terminal)
    assert "100%" in shown
    assert "weight.caffemodel" in shown
    assert b"opset         22" in done.stdout


def test_progress_bar_needs_a_terminal(large: tuple[Path, Path], tmp_path: Path) -> None:
    assert invoke(*large, "-o", tmp_path / "o").stderr == ""


def test_library_reports_its_progress(large: tuple[Path, Path]) -> None:
    steps: list[tuple[str, int, int]] = []
    convert(*large, progress=lambda *step: steps.append(step))
    assert steps[0] == ("reading", 0, 1)
    assert [step for step in steps if step[1] == step[2]] == [("reading", 1, 1), ("layers", 1, 1), ("weights", 3, 3)]


def test_convert_is_a_subcommand_of_atserving(net: tuple[Path, Path], tmp_path: Path) -> None:
    atserving = Path(sys.executable).parent / "atserving"
    done = subprocess.run(
        [atserving, "convert", *net, "-o", tmp_path / "o"], capture_output=True, check=True, text=True
    )
    assert "prob (N, 4, 6, 6)" in done.stdout


def test_written_file_gives_the_same_results_as_the_library(tmp_path: Path) -> None:
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
