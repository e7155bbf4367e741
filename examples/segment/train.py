"""Train the example app `digits-segment` and write everything in this folder.

    python -m examples.segment.train

The script trains the net of deploy.prototxt on scenes of digits. Scenes of held-out digits give the figures in
README.md and the pictures in images/. The server's converter turns the written net into ONNX. The script compares the
converted net with PyTorch and OpenCV, and measures the figures with it.
"""

import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch  # type: ignore[import-not-found,unused-ignore]
from torch import nn  # type: ignore[import-not-found,unused-ignore]

from examples.caffe_files import Array, write_tar
from examples.digit_pictures import SEED, Split, load_split
from examples.scenes import LABELS, Mask, Recipe, Scene, any_size, draw, endless, png, resize
from examples.to_caffe import (
    INPUT_SCALE,
    at_most,
    channel_mean,
    fold_input_scale,
    open_onnx,
    open_opencv,
    planes,
    release_files,
    torch_outputs,
    write_page,
)

HERE = Path(__file__).parent
NAME = "digits-segment"
INPUT_SIZE = 128
RECIPE = Recipe(smallest=0.25, largest=0.6, most_digits=5)
STEPS = 1400
BATCH_SIZE = 12
# The loss weighs the more frequent background pixels less than digits' pixels, which have weight 1.
GROUND_WEIGHT = 0.3
HELD_OUT_SCENES = 400
COMPARED_SCENES = 32
SAMPLE_SIZES = ((160, 120), (200, 200), (256, 192))
TOLERANCE = 1e-4
# Channels of the input and after each convolution.
WIDTHS = (3, 16, 24, 48, 48, 64, 64, 80, 80)
# A pooling after these convolutions halves the size; the way up adds their outputs.
STEPS_DOWN = (6, 4, 2)


class Segmenter(nn.Module):  # type: ignore[misc,unused-ignore]
    """The net of deploy.prototxt: down to a sixteenth, up again by deconvolution, adding outputs from the way down."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(1, len(WIDTHS)):
            kernel, stride = (5, 2) if number == 1 else (3, 1)
            conv = nn.Conv2d(WIDTHS[number - 1], WIDTHS[number], kernel, stride, kernel // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(WIDTHS[number], eps=1e-5))
        width = WIDTHS[-1]
        for number in STEPS_DOWN:
            up = nn.ConvTranspose2d(width, WIDTHS[number], 4, stride=2, padding=1, bias=False)
            self.add_module(f"up{number}", up)
            self.add_module(f"bn_sum{number}", nn.BatchNorm2d(WIDTHS[number], eps=1e-5))
            width = WIDTHS[number]
        # In deploy.prototxt this layer has no pad; a Crop after it has the same effect.
        self.score_wide = nn.ConvTranspose2d(width, len(LABELS), 4, stride=2, padding=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        blob = inputs
        seen = {}
        for number in range(1, len(WIDTHS)):
            blob = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(blob)).relu()
            if number in STEPS_DOWN:
                seen[number] = blob
                blob = nn.functional.max_pool2d(blob, 2)
        for number in STEPS_DOWN:
            total = self.get_submodule(f"up{number}")(blob) + seen[number]
            blob = self.get_submodule(f"bn_sum{number}")(total).relu()
        scores: torch.Tensor = self.score_wide(blob)
        return scores


def train(split: Split, mean: Array) -> Segmenter:
    """Train for a fixed number of steps, each on new scenes."""
    torch.manual_seed(SEED)
    net = Segmenter()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=STEPS)
    label_weights = torch.tensor([GROUND_WEIGHT] + [1.0] * (len(LABELS) - 1))
    source = endless(RECIPE, split.train, split.train_labels, INPUT_SIZE, SEED)
    for step in range(STEPS):
        scenes = list(islice(source, BATCH_SIZE))
        inputs = planes([scene.image for scene in scenes], mean) * np.float32(INPUT_SCALE)
        masks = torch.from_numpy(np.stack([scene.mask for scene in scenes]).astype(np.int64))
        loss = nn.functional.cross_entropy(net(torch.from_numpy(inputs)), masks, label_weights)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    fold_input_scale(net.get_submodule("conv1"))
    net.eval()
    return net


def compare(net: Segmenter, files: dict[str, bytes], inputs: Array) -> dict[str, float]:
    """Return the largest differences of the converted net's scores from PyTorch's and from OpenCV's Caffe reader's."""
    scores = open_onnx(files).run(["score"], {"data": inputs})[0]
    opencv = open_opencv(files)
    opencv.setInput(inputs, "data")
    worst = {
        "torch": float(np.abs(scores - torch_outputs(net, inputs)[0]).max()),
        "opencv": float(np.abs(scores - np.asarray(opencv.forward("score"), np.float32)).max()),
        "largest": float(np.abs(scores).max()),
    }
    if max(worst["torch"], worst["opencv"]) > TOLERANCE:
        raise SystemExit(f"the written net's scores differ: {worst}")
    return worst


def segment(session: onnxruntime.InferenceSession, scene: Scene, mean: Array) -> Mask:
    """Return the converted net's mask of a scene, in the scene's size."""
    scores = session.run(["score"], {"data": planes([resize(scene, INPUT_SIZE).image], mean)})[0][0]
    height, width = scene.mask.shape
    sized = cv2.resize(scores.transpose(1, 2, 0), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(sized.argmax(axis=2), np.uint8)


def unions(session: onnxruntime.InferenceSession, scenes: Sequence[Scene], mean: Array) -> list[float]:
    """Return the intersection over union of each label, over all pixels of all scenes."""
    labels = len(LABELS)
    table = np.zeros((labels, labels), np.int64)
    for scene in scenes:
        pairs = scene.mask.astype(np.int64) * labels + segment(session, scene, mean)
        table += np.bincount(pairs.reshape(-1), minlength=labels * labels).reshape(labels, labels)
    both = table.diagonal()
    each: list[float] = (both / (table.sum(axis=0) + table.sum(axis=1) - both)).tolist()
    return each


def write_samples(split: Split) -> None:
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(SEED + 2)
    truth = {}
    for number, size in enumerate(SAMPLE_SIZES, start=1):
        scene = draw(RECIPE, split.test, split.test_labels, size, rng)
        (folder / f"{number}.png").write_bytes(png(scene.image))
        (folder / f"{number}.mask.png").write_bytes(png(scene.mask))
        truth[f"{number}.png"] = {"mask": f"{number}.mask.png", "classes": [LABELS[label] for label in scene.labels]}
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)  # one thread sums in one order: the same weights every time
    torch.use_deterministic_algorithms(True)
    split = load_split()
    first_scenes = islice(endless(RECIPE, split.train, split.train_labels, INPUT_SIZE, SEED), 200)
    mean = channel_mean(scene.image for scene in first_scenes)
    net = train(split, mean)
    seconds = time.monotonic() - started
    files = release_files(NAME, HERE / "deploy.prototxt", net, mean, INPUT_SIZE)
    tar = HERE / f"{NAME}-v1.tar"
    write_tar(tar, files)
    write_samples(split)

    rng = np.random.default_rng(SEED + 1)
    scenes = [draw(RECIPE, split.test, split.test_labels, any_size(rng), rng) for _ in range(HELD_OUT_SCENES)]
    compared = planes([resize(scene, INPUT_SIZE).image for scene in scenes[:COMPARED_SCENES]], mean)
    worst = compare(net, files, compared)
    each = unions(open_onnx(files), scenes, mean)
    values: dict[str, object] = {
        "off_torch": at_most(worst["torch"]),
        "off_opencv": at_most(worst["opencv"]),
        "largest": f"{worst['largest']:.0f}",
        "miou": f"{np.mean(each):.3f}",
        "ground": f"{each[0]:.3f}",
        "least": f"{min(each):.3f}",
        "least_name": LABELS[int(np.argmin(each))],
        "digits": sum(len(scene.labels) for scene in scenes),
        "scenes": len(scenes),
        "compared": len(compared),
        "kilobytes": f"{tar.stat().st_size / 1000:.0f}",
        "weights": sum(parameter.numel() for parameter in net.parameters()),
        "trained_scenes": STEPS * BATCH_SIZE,
        "size": INPUT_SIZE,
        "train": len(split.train),
        "test": len(split.test),
    }
    write_page(HERE, values)
    print(f"{seconds:.0f} s of training; {values}")


if __name__ == "__main__":
    main()
