"""Whole nets give the answers of other engines: real Caffe, or OpenCV.

Our own nets are the fixtures `net_...`, the layouts and the examples. The tests also compare published networks, if
this machine has them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from bench.nets import CaffeNet, resnet_50
from evaluator.caffe import ConversionError, convert

from .boxes import rows
from .layouts import LAYOUTS
from .nets import FIXTURES, MODELS, draw_weights, error, normal, run, session, write_net
from .oracle import opencv_outputs
from .whole_nets import EXAMPLES, NETWORKS, STRUCTURES, example, layout_image, smaller

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
BATCHES = (1, 2, 5, 16)


def network(name: str) -> tuple[onnx.ModelProto, dict[str, dict[str, np.ndarray]]]:
    folder = MODELS / name
    if not folder.is_dir():
        pytest.skip("the trained networks are not on this machine")
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / "expected.npz") as stored:
        for key in stored.files:
            case, blob = key.split("|", 1)
            cases.setdefault(case, {})[blob] = stored[key]
    return convert(folder / "deploy.prototxt", folder / "weight.caffemodel"), cases


def structure(name: str) -> str:
    """Return the prototxt of a structure with the sizes under test."""
    path = MODELS / "structures" / f"{name}.prototxt"
    if not path.is_file():
        pytest.skip("the structures are not on this machine")
    return smaller(path.read_text(), STRUCTURES[name][1])


def check_output(actual: np.ndarray, expected: np.ndarray) -> None:
    if actual.shape[-1:] == (7,) and actual.ndim == 4:
        actual, expected = rows(actual), rows(expected)
    assert error(actual, expected) < TOLERANCE


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[CaffeNet, tuple[str, ...]]:
    found = LAYOUTS[request.param]
    return found.make(), found.blobs


def test_layout_gives_the_answers_of_opencv(layout: tuple[CaffeNet, tuple[str, ...]], tmp_path: Path) -> None:
    net, blobs = layout
    model = convert(*net.write(tmp_path), outputs=blobs)
    onnx.checker.check_model(model, full_check=True)
    engine = session(model)
    image = {"data": layout_image(net, engine.get_inputs()[0].shape[1:])}
    outputs = run(engine, image)
    expected = opencv_outputs(tmp_path, net.prototxt, net.weights, image, list(outputs))
    for blob, output in outputs.items():
        check_output(output, expected[blob])


def test_layout_answers_every_image_of_a_batch_as_if_it_were_alone(
    layout: tuple[CaffeNet, tuple[str, ...]], tmp_path: Path
) -> None:
    net, _ = layout
    engine = session(convert(*net.write(tmp_path)))
    check_batches(engine, [layout_image(net, engine.get_inputs()[0].shape[1:], seed) for seed in range(3)])


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_gives_the_answers_of_opencv(name: str, tmp_path: Path) -> None:
    paths, image = example(name, tmp_path)
    outputs = run(convert(*paths), {"data": image})
    net = cv2.dnn.readNetFromCaffe(*map(str, paths))
    net.setInput(image, "data")
    (output,) = outputs.values()
    assert output.size > 9
    check_output(output, net.forward())


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_answers_every_image_of_a_batch_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    paths, image = example(name, tmp_path)
    check_batches(session(convert(*paths)), [image, image[..., ::-1].copy(), image + 9 * normal(*image.shape)])


@pytest.mark.parametrize("name", NETWORKS)
def test_network_gives_the_answers_of_caffe(name: str) -> None:
    model, cases = network(name)
    onnx.checker.check_model(model, full_check=True)
    engine = session(model)
    for case in cases.values():
        outputs = run(engine, {engine.get_inputs()[0].name: case["in"]})
        expected = {blob.removeprefix("out|"): array for blob, array in case.items() if blob != "in"}
        assert outputs.keys() == expected.keys()
        for blob, array in expected.items():
            check_output(outputs[blob], array)


def check_batches(engine: onnxruntime.InferenceSession, images: list[np.ndarray]) -> None:
    """Assert that every batch gives the answers of its images alone. Batches repeat the images in turn."""
    feed = engine.get_inputs()[0].name
    alone = [run(engine, {feed: image}) for image in images]
    for batch in BATCHES:
        together = run(engine, {feed: np.concatenate([images[i % len(images)] for i in range(batch)])})
        for blob, output in together.items():
            answers = [alone[i % len(images)][blob] for i in range(batch)]
            if output.ndim == 4 and output.shape[-1] == 7:
                # Its first column is the image's place in the batch, and its rows lie along axis 2.
                answers = [np.concatenate([np.full_like(a[..., :1], i), a[..., 1:]], 3) for i, a in enumerate(answers)]
                assert error(output, np.concatenate(answers, axis=2)) < TOLERANCE
            else:
                assert error(output, np.concatenate(answers)) < TOLERANCE, (batch, blob)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_answers_every_image_of_a_batch_as_if_it_were_alone(name: str) -> None:
    model, cases = network(name)
    first, second = cases["img1"]["in"], cases["rand1"]["in"]
    check_batches(session(model), [first, second, (first + second) / 2])


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_answers_every_image_of_a_batch_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    prototxt = structure(name)
    engine = session(convert(*write_net(tmp_path, prototxt)))
    shape = engine.get_inputs()[0].shape[1:]
    check_batches(engine, [normal(1, *shape, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_with_random_weights_gives_the_answers_of_opencv(name: str, tmp_path: Path) -> None:
    prototxt, blobs = structure(name), STRUCTURES[name][0]
    weights = draw_weights(prototxt)
    model = convert(*write_net(tmp_path, prototxt, weights), outputs=blobs)
    engine = session(model)
    image = {engine.get_inputs()[0].name: normal(1, *engine.get_inputs()[0].shape[1:])}
    outputs = run(engine, image)
    expected = opencv_outputs(tmp_path, prototxt, weights, image, list(outputs))
    for blob, output in outputs.items():
        check_output(output, expected[blob])


TRAINING = """
layer { name: "train" type: "Data" top: "data" top: "label" include { phase: TRAIN } data_param { source: "a" } }
layer { name: "test" type: "Data" top: "data" top: "label" include { phase: TEST } data_param { source: "b" } }
"""
LOSS = """
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc2" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "fc2" bottom: "label" top: "accuracy" include { phase: TEST } }
"""


def training_net(head: str) -> str:
    """Return a fixture's net in its training form: with another head in place of its input, and a loss at its end."""
    lines = (FIXTURES / "net_digits" / "deploy.prototxt").read_text().splitlines()
    return head + "\n".join(line for line in lines if "Input" not in line and "Softmax" not in line) + LOSS


def test_training_net_with_only_data_layers_is_refused_for_want_of_a_shape(tmp_path: Path) -> None:
    (tmp_path / "train_test.prototxt").write_text(training_net(TRAINING))
    weights = FIXTURES / "net_digits" / "weight.caffemodel"
    with pytest.raises(ConversionError, match=r"train_test\.prototxt: has only Data layers, so its input has no shape"):
        convert(tmp_path / "train_test.prototxt", weights)


def test_training_net_with_an_input_serves_its_loss_as_a_softmax(tmp_path: Path) -> None:
    head = 'input: "data" input_shape { dim: 64 dim: 1 dim: 28 dim: 28 }\n'
    (tmp_path / "deploy.prototxt").write_text(training_net(head))
    model = convert(tmp_path / "deploy.prototxt", FIXTURES / "net_digits" / "weight.caffemodel")
    expected = np.load(FIXTURES / "net_digits" / "expected.npz")
    assert error(run(model, {"data": expected["b3|in|data"]})["loss"], expected["b3|out|prob"]) < TOLERANCE


def test_a_large_net_is_in_memory_at_most_three_times(tmp_path: Path) -> None:
    prototxt, weights = resnet_50().write(tmp_path)
    script = (
        "import sys\n"
        "from evaluator.caffe import convert\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "convert(*sys.argv[1:])\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, prototxt, weights],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert int(done.stdout) * 1024 < 3 * weights.stat().st_size


def test_the_command_needs_no_more_memory_than_the_library_and_its_interpreter(tmp_path: Path) -> None:
    paths = resnet_50().write(tmp_path)
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'evaluator.caffe', *sys.argv[1:]], check=True, stdout=2)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *paths, "-o", tmp_path / "net.onnx"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert int(done.stdout) * 1024 < 3 * paths[1].stat().st_size
