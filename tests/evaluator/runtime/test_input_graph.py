"""The graph of a built-in net scales, swaps and subtracts exactly as the transformer does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluator.caffe import convert
from evaluator.fetching.unpack import unpack
from evaluator.images import decode
from evaluator.runtime import input_graph, preprocessing
from evaluator.runtime.engine import Engine
from evaluator.runtime.graph import Graph
from evaluator.runtime.net import Net
from tests.caffe.nets import input_layer, layer, write_net
from tests.evaluator.built_in import config, evaluate, files, loaded, png
from tests.evaluator.digits import DIGITS
from tests.evaluator.mean_file import write_mean

HEIGHT, WIDTH = 6, 8
SWAP = {"channel_swap": [2, 1, 0]}
TURN = {"channel_swap": [1, 2, 0]}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"raw_scale": 1 / 255},
    {"raw_scale": -3.7},
    {"input_scale": 0.017},
    {"raw_scale": 0.1, "input_scale": 0.3},
    {"raw_scale": 0},
    SWAP,
    TURN,
    {"mean_values": 117.3},
    {"mean_values": [104.01, 116.67, 122.68]},
    {"image_width": 12},
    {"image_width": 13, "mean_values": 3},
    {"mean": True},
    {"mean": True, "image_width": 11, "input_scale": 1 / 128},
    {"mean": True, "raw_scale": 0.9, "input_scale": 1.1} | TURN,
    {"mean_values": [0.485, 0.456, 0.406], "raw_scale": 1 / 255, "input_scale": 1 / 0.226, "image_width": 16} | SWAP,
]


def identity(channels: int) -> str:
    """Return a net that gives its input."""
    return input_layer(1, channels, HEIGHT, WIDTH) + layer("Flatten", tops="flat")


def pictures(count: int) -> list[NDArray[np.uint8]]:
    """Return images of different sizes."""
    random = np.random.default_rng(3)
    return [random.integers(0, 256, (20 + 7 * each, 31 - each, 3), np.uint8) for each in range(count)]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("channels", [3, 1], ids=["colour", "grey"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graph_gives_the_numbers_of_the_transformer(
    options: dict[str, Any], channels: int, on_cpu: bool, tmp_path: Path
) -> None:
    options = dict(options)
    if channels == 1 and isinstance(options.get("mean_values"), list):
        options["mean_values"] = options["mean_values"][:1]
    release = files(tmp_path, identity(channels))
    if options.pop("mean", False):
        mean = np.random.default_rng(4).normal(110, 30, (channels, HEIGHT + 4, WIDTH + 5)).astype(np.float32)
        release["mean.binaryproto"] = write_mean(tmp_path / "mean.binaryproto", mean, legacy=False)
    transformer = preprocessing.transformer(config(release, **options), (channels, HEIGHT, WIDTH))
    graph = convert(release["deploy.prototxt"], release["weight.caffemodel"])
    input_graph.prepend(graph, transformer.arithmetic, on_cpu=on_cpu)
    net = Net.of(Engine(Graph.of(graph)))
    assert net.input_shape(net.inputs[0]) == (HEIGHT, WIDTH, channels)
    for count in (1, 4):
        batch = np.stack([transformer.pixels(image) for image in pictures(count)])
        assert batch.dtype == np.uint8
        expected = np.stack([transformer(image) for image in pictures(count)])
        # Equal to the bit: each step is one operation on float32 on both sides.
        np.testing.assert_array_equal(net.run({net.inputs[0]: batch})["flat"], expected.reshape(count, -1))


def test_built_in_net_gives_the_outputs_of_the_plain_net(tmp_path: Path) -> None:
    """The tolerance is for convolutions, whose layout onnxruntime may change behind other nodes."""
    prototxt = (
        input_layer(1, 3, 24, 32)
        + layer("Convolution", "data", "conv", "convolution_param { num_output: 16 kernel_size: 3 pad: 1 }", "conv")
        + layer("ReLU", "conv", "conv", "", "relu")
        + layer("Pooling", "conv", "pool", "pooling_param { pool: MAX kernel_size: 2 stride: 2 }", "pool")
        + layer("InnerProduct", "pool", "fc", "inner_product_param { num_output: 9 }", "fc")
    )
    options = {"mean_values": [104, 117, 123], "input_scale": 0.017, "image_width": 40} | SWAP
    release = config(files(tmp_path, prototxt), **options)
    plain = Net.load(release)
    transformer = preprocessing.transformer(release, (3, 24, 32))
    expected = plain.forward({"data": np.stack([transformer(image) for image in pictures(5)])})["fc"]
    rets = evaluate(loaded("feature", release), *((image, None) for image in pictures(5)))
    actual = np.stack([np.frombuffer(ret["result_file"], "<f4") for ret in rets])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_added_nodes_have_names_unused_in_the_net(tmp_path: Path) -> None:
    prototxt = input_layer(1, 3, HEIGHT, WIDTH, name="pixels") + layer("Flatten", "pixels", "pixels_")
    graph = convert(*write_net(tmp_path, prototxt))
    transformer = preprocessing.transformer(config({}, mean_values=5), (3, HEIGHT, WIDTH))
    input_graph.prepend(graph, transformer.arithmetic)
    net = Net.of(Engine(Graph.of(graph)))
    (image,) = pictures(1)
    outputs = net.run({net.inputs[0]: transformer.pixels(image)[np.newaxis]})
    np.testing.assert_array_equal(outputs["pixels_"].reshape(3, HEIGHT, WIDTH), transformer(image))


def test_preprocess_gives_pixels_in_uint8(tmp_path: Path) -> None:
    for channels in (3, 1):
        net = loaded("feature", config(files(tmp_path / str(channels), identity(channels)), image_width=12))
        pixels = net.preprocess({"data": {"body": png(pictures(1)[0])}}).pixels
        assert (pixels.dtype, pixels.shape) == (np.uint8, (HEIGHT, WIDTH, channels))


def test_several_threads_may_infer_at_once(tmp_path: Path) -> None:
    net = loaded("classify", config(unpack(DIGITS / "digits-v1.tar", tmp_path)))
    bodies = [(DIGITS / "images" / f"{digit}.png").read_bytes() for digit in range(10)]

    def digits(call: int) -> bool:
        wanted = [(call + each) % 10 for each in range(1 + call % 8)]
        reqs = [net.preprocess({"data": {"body": bodies[digit]}}) for digit in wanted]
        rets = net.infer("r", reqs)
        return [ret["result"]["confidences"][0]["index"] for ret in rets] == wanted

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(digits, range(200)))


def test_net_of_a_script_has_no_input_graph(tmp_path: Path) -> None:
    release = config(files(tmp_path, identity(3)), mean_values=100)
    net = Net.load(release)
    assert (net.inputs, net.input_shape("data")) == (["data"], (3, HEIGHT, WIDTH))
    image = decode(png(pictures(1)[0]), limits=release.limits)
    planes = preprocessing.transformer(release, (3, HEIGHT, WIDTH))(image)
    np.testing.assert_array_equal(net.forward(data=planes[np.newaxis])["flat"], planes.reshape(1, -1))
