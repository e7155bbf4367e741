"""Train the two versions of the example app `digits` and write everything in this folder.

    python -m examples.digits.train

The digits are scikit-learn's (`load_digits`). A fifth of them is held out from training, and gives the accuracies in
README.md and the pictures in images/. OpenCV reads every written net back, and the script compares it with PyTorch.
"""

import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import cv2
import numpy as np
import torch  # type: ignore[import-not-found,unused-ignore]
from torch import nn  # type: ignore[import-not-found,unused-ignore]

from examples.caffe_files import Array, binaryproto, caffemodel, write_tar
from examples.digit_pictures import NAMES, PICTURE_SIZE, SEED, Labels, Pictures, Split, load_split

HERE = Path(__file__).parent
INPUT_SIZE = 28  # height and width of the net's input
# Training multiplies (pixel - mean) by this factor; `train` then moves it into conv1's weights.
INPUT_SCALE = 1 / 64
BATCH_SIZE = 64
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Version:
    """The sizes and the number of epochs of one version of the net."""

    name: str
    conv1: int
    conv2: int
    hidden: int
    pool_kernel: int
    epochs: int


VERSIONS = (
    Version("v1", conv1=12, conv2=24, hidden=64, pool_kernel=2, epochs=25),
    Version("v2", conv1=24, conv2=48, hidden=96, pool_kernel=3, epochs=50),
)


def to_input(picture: Pictures) -> Pictures:
    """Resize a picture to the net's input as the server does."""
    resized = cv2.resize(picture, (INPUT_SIZE, INPUT_SIZE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def to_planes(inputs: Pictures) -> Array:
    """Repeat grey (n, h, w) as three equal planes (n, 3, h, w), like a grey file decoded to BGR."""
    return np.repeat(inputs[:, None].astype(np.float32), 3, axis=1)


def augment(picture: Pictures, rng: np.random.Generator) -> Pictures:
    """Shift, turn, squeeze, shrink and change the contrast of one picture, to imitate other hands and cameras."""
    centre = (PICTURE_SIZE - 1) / 2
    turn = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-12, 12), rng.uniform(0.65, 1.08))
    matrix = np.asarray(turn, dtype=np.float64)
    matrix[:, 0] *= rng.uniform(0.85, 1.1)
    matrix[:, 2] += centre - matrix @ (centre, centre, 1) + rng.uniform(-5, 5, size=2)
    warped = cv2.warpAffine(picture, matrix, (PICTURE_SIZE, PICTURE_SIZE), flags=cv2.INTER_LINEAR)
    contrast, floor = rng.uniform(0.6, 2.5), rng.uniform(0, 40)
    stretched = (warped.astype(np.float32) - 110) * contrast + 110 + floor
    return np.asarray(np.clip(stretched, floor, 255), dtype=np.uint8)


def build(version: Version) -> nn.Sequential:
    """Build the net of `deploy.template.prototxt` up to the softmax. Caffe's pooling rounds up, hence ceil_mode."""
    pool = nn.MaxPool2d(version.pool_kernel, stride=2, ceil_mode=True)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, version.conv1, 5),
            pool1=pool,
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(version.conv1, version.conv2, 5),
            pool2=pool,
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            ip1=nn.Linear(version.conv2 * 4 * 4, version.hidden),
            relu3=nn.ReLU(),
            drop3=nn.Dropout(0.4),
            ip2=nn.Linear(version.hidden, len(NAMES)),
        )
    )


def epoch_batches(split: Split, mean: Array, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one pass over the augmented training pictures, in a new order, scaled for training."""
    order = rng.permutation(len(split.train))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        inputs = np.stack([to_input(augment(split.train[index], rng)) for index in chosen])
        planes = to_planes(inputs) * rng.uniform(0.8, 1.0, size=(len(chosen), 3, 1, 1)).astype(np.float32)  # a tint
        yield torch.from_numpy((planes - mean) * np.float32(INPUT_SCALE)), torch.from_numpy(split.train_labels[chosen])


def train(version: Version, split: Split, mean: Array) -> nn.Sequential:
    """Train for a fixed number of epochs, then fold the input scale into conv1, so that the net takes pixel - mean."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    net = build(version)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = version.epochs * -(-len(split.train) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(version.epochs):
        for inputs, labels in epoch_batches(split, mean, rng):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(inputs), labels))
            optimizer.step()
            schedule.step()
    net.state_dict()["conv1.weight"].mul_(INPUT_SCALE)
    net.eval()
    return net


def release_files(version: Version, net: nn.Sequential, mean: Array) -> dict[str, bytes]:
    """Return the members of the version's tar."""
    name = f"digits-{version.name}"
    prototxt = Template((HERE / "deploy.template.prototxt").read_text()).substitute(
        name=name,
        size=INPUT_SIZE,
        conv1=version.conv1,
        conv2=version.conv2,
        pool_kernel=version.pool_kernel,
        hidden=version.hidden,
        classes=len(NAMES),
    )
    kinds = {"conv1": "Convolution", "conv2": "Convolution", "ip1": "InnerProduct", "ip2": "InnerProduct"}
    weights = net.state_dict()
    layers = [
        (layer, kind, [weights[f"{layer}.weight"].numpy(), weights[f"{layer}.bias"].numpy()])
        for layer, kind in kinds.items()
    ]
    return {
        "deploy.prototxt": prototxt.encode(),
        "labels.csv": "".join(f"{index},{label}\n" for index, label in enumerate(NAMES)).encode(),
        "mean.binaryproto": binaryproto(mean),
        "weight.caffemodel": caffemodel(name, layers),
    }


def torch_probabilities(net: nn.Sequential, inputs: Array) -> Array:
    with torch.inference_mode():
        return np.asarray(torch.softmax(net(torch.from_numpy(inputs)), dim=1).numpy())


def caffe_probabilities(files: dict[str, bytes], inputs: Array) -> Array:
    """Return OpenCV's probabilities for the written files."""
    with tempfile.TemporaryDirectory() as folder:
        prototxt, weights = Path(folder, "deploy.prototxt"), Path(folder, "weight.caffemodel")
        prototxt.write_bytes(files[prototxt.name])
        weights.write_bytes(files[weights.name])
        reader = cv2.dnn.readNetFromCaffe(str(prototxt), str(weights))
    reader.setInput(inputs, "data")
    return np.asarray(reader.forward("prob"), dtype=np.float32)


def write_images(split: Split) -> None:
    """Write the first held-out picture of each digit as grey PNG, and another, larger and tinted, as a colour JPEG."""
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    for digit in range(len(NAMES)):
        cv2.imwrite(str(folder / f"{digit}.png"), split.test[split.test_labels == digit][0])
    five = cv2.resize(split.test[split.test_labels == 5][1], (120, 120), interpolation=cv2.INTER_CUBIC)
    tinted = five[:, :, None] * np.array([0.8, 0.95, 1.0])
    cv2.imwrite(str(folder / "5.jpg"), tinted.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])


def held_out_inputs(split: Split, mean: Array) -> tuple[Array, Labels, Array, Labels]:
    """Return the held-out inputs less the mean, with labels: first unchanged, then each in ten changed forms."""
    plain = to_planes(np.stack([to_input(picture) for picture in split.test])) - mean
    rng = np.random.default_rng(SEED + 1)
    repeated = np.repeat(split.test, 10, axis=0)
    changed = to_planes(np.stack([to_input(augment(picture, rng)) for picture in repeated])) - mean
    return plain, split.test_labels, changed, np.repeat(split.test_labels, 10)


def make_version(version: Version, split: Split, mean: Array) -> dict[str, object]:
    """Train a version, write its tar and check it. Return its figures for the README."""
    net = train(version, split, mean)
    files = release_files(version, net, mean)
    tar = HERE / f"digits-{version.name}.tar"
    write_tar(tar, files)

    plain, labels, changed, changed_labels = held_out_inputs(split, mean)
    probabilities = caffe_probabilities(files, plain)
    worst = float(np.abs(torch_probabilities(net, plain) - probabilities).max())
    if worst > TOLERANCE:
        raise SystemExit(f"{version.name}: the written net's probabilities differ from PyTorch's by up to {worst:.1e}")
    right = int((probabilities.argmax(axis=1) == labels).sum())
    right_changed = float((caffe_probabilities(files, changed).argmax(axis=1) == changed_labels).mean())
    print(
        f"{version.name}: {right} of {len(labels)} held-out digits right ({right / len(labels):.2%}), "
        f"{right_changed:.2%} when changed; {tar.stat().st_size} bytes; OpenCV within {worst:.1e} of PyTorch"
    )
    return {
        **vars(version),
        "right": right,
        "accuracy": f"{right / len(labels):.1%}",
        "accuracy_changed": f"{right_changed:.1%}",
        "kilobytes": f"{tar.stat().st_size / 1000:.0f}",
    }


def write_readme(split: Split, figures: dict[str, dict[str, object]]) -> None:
    values: dict[str, object] = {"train": len(split.train), "test": len(split.test), "size": INPUT_SIZE}
    for version, its_figures in figures.items():
        values |= {f"{version}_{key}": value for key, value in its_figures.items()}
    template = Template((HERE / "README.template.md").read_text())
    (HERE / "README.md").write_text(template.substitute(values))


def main() -> None:
    started = time.monotonic()
    torch.set_num_threads(1)  # one thread sums in one order: the same weights every time
    torch.use_deterministic_algorithms(True)
    split = load_split()
    mean = to_planes(np.stack([to_input(picture) for picture in split.train])).mean(axis=0, dtype=np.float64)
    figures = {version.name: make_version(version, split, mean.astype(np.float32)) for version in VERSIONS}
    write_images(split)
    write_readme(split, figures)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
