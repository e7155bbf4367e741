"""Train the example app `digits-detect` and write everything in this folder.

    python -m examples.detect.train

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
from examples.detect import boxes as geometry
from examples.digit_pictures import SEED, Split, load_split
from examples.scenes import LABELS, Recipe, Scene, any_size, draw, endless, png, resize
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
NAME = "digits-detect"
INPUT_SIZE = 128
RECIPE = Recipe(smallest=0.18, largest=0.5, most_digits=6)
STEPS = 1500
BATCH_SIZE = 16
HELD_OUT_SCENES = 400
COMPARED_SCENES = 64
SAMPLE_SIZES = ((160, 120), (200, 200), (256, 192))
TOLERANCE = 1e-4
PRIORS = geometry.priors(INPUT_SIZE)


class Detector(nn.Module):  # type: ignore[misc,unused-ignore]
    """The net of deploy.prototxt up to its raw locations (n, priors, 4) and confidences (n, priors, labels)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 24, 48, 64, 64, 96, 96)
        for number in range(1, 8):
            kernel, stride = (5, 2) if number == 1 else (3, 1)
            conv = nn.Conv2d(widths[number - 1], widths[number], kernel, stride, kernel // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(widths[number], eps=1e-5))
        for head, width in (("small", 64), ("large", 96)):
            for what, numbers in (("loc", 4), ("conf", len(LABELS))):
                outputs = geometry.PRIORS_A_CELL * numbers
                self.add_module(f"{head}_{what}", nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blob = inputs
        maps = {}
        for number in range(1, 8):
            blob = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(blob)).relu()
            maps[number] = blob
            if number in (2, 3, 5):
                blob = nn.functional.max_pool2d(blob, 2)
        heads = (("small", maps[5]), ("large", maps[7]))
        return self._rows("loc", heads, 4), self._rows("conf", heads, len(LABELS))

    def _rows(self, what: str, heads: Sequence[tuple[str, torch.Tensor]], numbers: int) -> torch.Tensor:
        rows = [self.get_submodule(f"{head}_{what}")(blob).permute(0, 2, 3, 1) for head, blob in heads]
        return torch.cat([row.reshape(len(row), -1, numbers) for row in rows], dim=1)


def targets(scene: Scene) -> tuple[Array, geometry.Indices]:
    """Return the priors' target locations and labels. Ignore a location with label 0."""
    matched = geometry.match(PRIORS, scene.boxes / np.float32(INPUT_SIZE))
    labels = np.append(scene.labels, 0)[matched]  # -1 (unmatched) selects the 0 at the end
    wanted = np.append(scene.boxes / np.float32(INPUT_SIZE), PRIORS[:1], axis=0)[matched]
    return geometry.encode(PRIORS, wanted), labels


def loss_of(locations: torch.Tensor, confidences: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
    """Return SSD's loss: smooth L1 for matched priors, cross-entropy for them and three times as many worst others."""
    pairs = [targets(scene) for scene in scenes]
    wanted = torch.from_numpy(np.stack([pair[0] for pair in pairs]))
    labels = torch.from_numpy(np.stack([pair[1] for pair in pairs]))
    matched = labels > 0
    count = int(matched.sum())
    place = nn.functional.smooth_l1_loss(locations[matched], wanted[matched], reduction="sum")
    kind = nn.functional.cross_entropy(confidences.transpose(1, 2), labels, reduction="none")
    worst_others = kind[~matched].topk(min(3 * count, int((~matched).sum()))).values
    return (place + kind[matched].sum() + worst_others.sum()) / count


def train(split: Split, mean: Array) -> Detector:
    """Train for a fixed number of steps, each on new scenes."""
    torch.manual_seed(SEED)
    net = Detector()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=STEPS)
    source = endless(RECIPE, split.train, split.train_labels, INPUT_SIZE, SEED)
    for step in range(STEPS):
        scenes = list(islice(source, BATCH_SIZE))
        inputs = planes([scene.image for scene in scenes], mean) * np.float32(INPUT_SCALE)
        locations, confidences = net(torch.from_numpy(inputs))
        loss = loss_of(locations, confidences, scenes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    fold_input_scale(net.get_submodule("conv1"))
    net.eval()
    return net


def rows_of(session: onnxruntime.InferenceSession, inputs: Array) -> Array:
    """Return the converted net's rows (image, label, score, box)."""
    rows: Array = session.run(["detection_out"], {"data": inputs})[0].reshape(-1, 7)
    return rows


def opencv_rows(net: cv2.dnn.Net, picture: Array) -> Array:
    """Return OpenCV's rows (label, score, box) for one input, in the converted net's order."""
    net.setInput(picture[None], "data")
    rows = np.asarray(net.forward("detection_out"), np.float32).reshape(-1, 7)[:, 1:]
    rows = rows[rows[:, 0] > 0]  # OpenCV fills up to keep_top_k with zeros
    return rows[np.lexsort((-rows[:, 1], rows[:, 0]))]


def difference(name: str, first: Array, second: Array) -> float:
    """Return the largest difference; exit if it exceeds the tolerance."""
    if first.shape != second.shape:
        raise SystemExit(f"{name}: {first.shape} and {second.shape}")
    worst = float(np.abs(first - second).max(initial=0))
    if worst > TOLERANCE:
        raise SystemExit(f"{name}: differs by up to {worst:.1e}")
    return worst


def compare(net: Detector, files: dict[str, bytes], inputs: Array) -> dict[str, float]:
    """Return the converted net's largest differences from PyTorch, raw and in rows, and from OpenCV's Caffe reader."""
    raw = open_onnx(files, outputs=["loc", "conf"]).run(["loc", "conf"], {"data": inputs})
    locations, confidences = torch_outputs(net, inputs)
    probabilities = torch.softmax(torch.from_numpy(confidences), dim=2).numpy()
    worst = {
        "loc": difference("loc", raw[0].reshape(locations.shape), locations),
        "conf": difference("conf", raw[1].reshape(confidences.shape), confidences),
        "rows": 0.0,
        "opencv": 0.0,
    }
    rows = rows_of(open_onnx(files), inputs)
    opencv = open_opencv(files)
    for index, picture in enumerate(inputs):
        its_rows = rows[rows[:, 0] == index][:, 1:]
        wanted = geometry.detections(PRIORS, locations[index], probabilities[index])
        worst["rows"] = max(worst["rows"], difference(f"rows of {index}", its_rows, wanted))
        others = opencv_rows(opencv, picture)
        worst["opencv"] = max(worst["opencv"], difference(f"OpenCV's rows of {index}", its_rows, others))
    return worst


def precisions(session: onnxruntime.InferenceSession, scenes: Sequence[Scene], mean: Array) -> list[float]:
    """Return the average precision of each digit, at an overlap of 0.5 in the scenes' pixels."""
    found = []
    for scene in scenes:
        rows = rows_of(session, planes([resize(scene, INPUT_SIZE).image], mean))[:, 1:]
        height, width = scene.mask.shape
        rows[:, 2:] *= np.array([width, height] * 2, np.float32)
        found.append(rows)
    return [
        geometry.average_precision(
            [rows[rows[:, 0] == label][:, 1:] for rows in found],
            [scene.boxes[scene.labels == label] for scene in scenes],
        )
        for label in range(1, len(LABELS))
    ]


def write_samples(split: Split) -> None:
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(SEED + 2)
    truth = {}
    for number, size in enumerate(SAMPLE_SIZES, start=1):
        scene = draw(RECIPE, split.test, split.test_labels, size, rng)
        (folder / f"{number}.png").write_bytes(png(scene.image))
        truth[f"{number}.png"] = [
            {"class": LABELS[label], "box": box}
            for label, box in zip(scene.labels.tolist(), scene.boxes.astype(int).tolist(), strict=True)
        ]
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
    each = precisions(open_onnx(files), scenes, mean)
    values: dict[str, object] = {
        **{f"off_{name}": at_most(value) for name, value in worst.items()},
        "map": f"{np.mean(each):.3f}",
        "least": f"{min(each):.3f}",
        "least_name": LABELS[1 + int(np.argmin(each))],
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
