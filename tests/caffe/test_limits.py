"""Limits: irregular files, long messages, and models above the size limit of ONNX."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evaluator.caffe import ConversionError, cli, convert, export
from evaluator.caffe.caffemodel import read_blob
from evaluator.caffe.saving import size, write

from .nets import input_layer, layer, write_net

NET = input_layer(1, 3, 8, 8) + layer("ReLU")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.convert, [str(argument) for argument in arguments], catch_exceptions=False)


def test_irregular_file_is_refused(tmp_path: Path) -> None:
    good = write_net(tmp_path, NET, {})
    os.mkfifo(tmp_path / "fifo")
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "fifo"):
        for pair in ((path, good[1]), (good[0], path)):
            with pytest.raises(ConversionError, match=f"^{path.name}: cannot be read: not a regular file$"):
                convert(*pair)
        with pytest.raises(ConversionError, match="not a regular file"):
            read_blob(path)
    for folder in (tmp_path, Path(".")):
        with pytest.raises(ConversionError, match=r"^[^:]+: cannot be read: Is a directory$"):
            convert(folder, good[1])


def test_file_that_grows_during_the_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = write_net(tmp_path, NET, {})
    status = os.stat(paths[0])
    earlier = os.stat_result((*status[:6], status.st_size - 1, *status[7:10]))
    monkeypatch.setattr(os, "fstat", lambda _: earlier)
    with pytest.raises(ConversionError, match=r"^deploy\.prototxt: cannot be read: the file grew during the read$"):
        convert(*paths)


@pytest.mark.parametrize(
    "prototxt",
    [
        NET + layer("ReLU", "out", "x" * 10**6),
        NET + layer("ReLU", "x" * 10**6),
        NET + layer("X" * 10**6, "out", "end"),
        NET + layer("ReLU", "out", "end", name="x" * 10**6),
        "".join(f"{letter}: " for letter in "x" * 10**5),
    ],
)
def test_message_has_bounded_length(prototxt: str, tmp_path: Path) -> None:
    paths = write_net(tmp_path, prototxt, {})
    with pytest.raises(ConversionError) as caught:
        convert(*paths)
    assert len(str(caught.value)) < 800


def test_long_reason_is_cut_in_the_middle() -> None:
    error = ConversionError(f"begins {'x' * 1000} ends", layer="n" * 1000, layer_type="ReLU")
    assert error.reason.startswith("begins xxx")
    assert error.reason.endswith("xxx ends")
    assert "…" in error.reason
    assert error.layer is not None
    assert len(error.layer) < 210
    assert ConversionError("short", layer="a").layer == "a"


@pytest.mark.parametrize(
    "more",
    [
        "convolution_param { num_output: 4 kernel_size: 3 }",
        "prior_box_param { min_size: 2 }",
    ],
)
def test_model_above_the_size_limit_is_refused(more: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind, bottoms = ("PriorBox", "data data") if "prior" in more else ("Convolution", "data")
    paths = write_net(tmp_path, input_layer(1, 3, 8, 8) + layer(kind, bottoms, more=more))
    whole = size(convert(*paths))
    for limit in range(0, whole, 7):
        monkeypatch.setattr(export, "_MAX_BYTES", limit)
        with pytest.raises(ConversionError, match="above the 2 GiB limit of an ONNX file"):
            convert(*paths)
    monkeypatch.setattr(export, "_MAX_BYTES", whole + 500)
    assert size(convert(*paths)) == whole


def test_constant_shared_by_outputs_is_stored_once(tmp_path: Path) -> None:
    prior = layer("PriorBox", "data data", "p", "prior_box_param { min_size: 2 }")
    aliases = layer("Split", "p", " ".join(f"s{i}" for i in range(9)))
    model = convert(*write_net(tmp_path, input_layer(1, 3, 80, 80) + prior + aliases, {}))
    assert size(model) < 80 * 80 * 32 + 4000
    assert [output.name for output in model.graph.output] == [f"s{i}" for i in range(9)]


def test_only_a_regular_file_is_overwritten(tmp_path: Path) -> None:
    paths = write_net(tmp_path / "in", NET, {})
    model = convert(*paths)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "folder", "link"):
        done = invoke(*paths, "-o", tmp_path / name)
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"atserving convert: {tmp_path / name}: ")
        with pytest.raises(OSError, match=str(tmp_path / name)):
            write(model, tmp_path / name)
    assert (tmp_path / "fifo").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "in", "link"]
    done = invoke(*paths, "-o", "/dev/null")
    assert (done.exit_code, done.stderr) == (
        1,
        "atserving convert: /dev/null: exists and is not a regular file\n",
    )


@pytest.mark.parametrize("output", ["/nonexistent/x.onnx", "nonexistent/x.onnx", ".", "", "/dev/null/x"])
def test_error_names_the_output_as_given(output: str, tmp_path: Path) -> None:
    done = invoke(*write_net(tmp_path, NET, {}), "-o", output)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"atserving convert: {output or '.'}: ")
    assert done.stderr.count("\n") == 1


def test_input_cannot_be_added_as_an_output(tmp_path: Path) -> None:
    done = invoke(*write_net(tmp_path, NET, {}), "-o", tmp_path / "x.onnx", "--add-output", "data")
    message = "atserving convert: deploy.prototxt: blob 'data' is an input and cannot be an output\n"
    assert (done.exit_code, done.stderr) == (1, message)


def test_memory_error_during_the_write_prints_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cli, "write", no_memory)
    done = invoke(*write_net(tmp_path, NET, {}), "-o", tmp_path / "x.onnx")
    message = "atserving convert: deploy.prototxt: needs more memory than is available\n"
    assert (done.exit_code, done.stderr) == (1, message)
