"""Write a Caffe net layer by layer, and draw its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.caffe_files import Array, caffemodel


@dataclass(frozen=True)
class CaffeNet:
    """A net: the contents of its two files."""

    name: str
    prototxt: str
    layers: tuple[tuple[str, str, list[Array]], ...]
    """Name, type and weights of each layer with weights."""

    @property
    def weights(self) -> dict[str, list[Array]]:
        """The weights by the layer's name."""
        return {name: blobs for name, _, blobs in self.layers}

    def files(self) -> dict[str, bytes]:
        """Return the contents of both files by their names in a release."""
        return {
            "deploy.prototxt": self.prototxt.encode(),
            "weight.caffemodel": caffemodel(self.name, self.layers),
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both files into a folder; return the paths of the prototxt and of the caffemodel."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)
        return folder / "deploy.prototxt", folder / "weight.caffemodel"


class NetBuilder:
    """Builds a net whose activations keep about the scale of its input, however deep it is.

    Every method adds a layer and returns the name of its top blob. BatchNorm, Scale and ReLU work in place, as usual in
    Caffe. Convolutions get He's initialisation, and BatchNorm statistics near those of its input.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self._name = name
        self._lines = [f'name: "{name}"']
        self._layers: list[tuple[str, str, list[Array]]] = []
        self._channels: dict[str, int] = {}
        self._random = np.random.default_rng(seed)

    def build(self) -> CaffeNet:
        return CaffeNet(self._name, "\n".join(self._lines) + "\n", tuple(self._layers))

    def layer(
        self,
        kind: str,
        name: str,
        bottoms: Sequence[str],
        parameters: str = "",
        *,
        channels: int = 0,
        weights: Sequence[Array] = (),
        more_tops: Sequence[str] = (),
    ) -> str:
        """Add a layer; its top has its name, and by default the channels of its first bottom."""
        self._add(kind, name, bottoms, (name, *more_tops), parameters)
        self._channels[name] = channels or self._channels[bottoms[0]]
        if weights:
            self._layers.append((name, kind, list(weights)))
        return name

    def input(self, channels: int, height: int, width: int, name: str = "data") -> str:
        shape = f"shape {{ dim: 1 dim: {channels} dim: {height} dim: {width} }}"
        return self.layer("Input", name, [], f"input_param {{ {shape} }}", channels=channels)

    def convolution(
        self,
        bottom: str,
        name: str,
        outputs: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        pad: int = 0,
        dilation: int = 1,
        group: int = 1,
        bias: bool = False,
        scale: float = 1.0,
        kind: str = "Convolution",
    ) -> str:
        """Add a convolution; ``scale`` multiplies the weights. A Deconvolution has the same fields."""
        inputs = self._channels[bottom]
        shape = (outputs, inputs // group, kernel, kernel)
        if kind == "Deconvolution":
            shape = (inputs, outputs // group, kernel, kernel)
        blobs = [self._he(shape, inputs // group * kernel**2, scale)]
        blobs += [self._normal((outputs,), 0.1 * scale)] if bias else []
        fields = f"num_output: {outputs} bias_term: {str(bias).lower()} kernel_size: {kernel} stride: {stride}"
        fields += f" pad: {pad} dilation: {dilation} group: {group}"
        return self.layer(kind, name, [bottom], f"convolution_param {{ {fields} }}", channels=outputs, weights=blobs)

    def batch_norm(self, blob: str, name: str, *, scale: float = 1.0) -> str:
        """Add a BatchNorm and its Scale in place; ``scale`` multiplies the result."""
        channels = self._channels[blob]
        # Caffe stores sums of statistics, and their divisor.
        factor = 2.0
        mean = self._normal((channels,), 0.1) * factor
        variance = self._uniform((channels,)) * factor
        self._layers.append((f"{name}/bn", "BatchNorm", [mean, variance, np.array([factor], np.float32)]))
        self._layers.append(
            (f"{name}/scale", "Scale", [self._uniform((channels,)) * scale, self._normal((channels,), 0.1)])
        )
        self._add("BatchNorm", f"{name}/bn", [blob], [blob], "batch_norm_param { use_global_stats: true }")
        self._add("Scale", f"{name}/scale", [blob], [blob], "scale_param { bias_term: true }")
        return blob

    def relu(self, blob: str, name: str) -> str:
        """Add a ReLU in place."""
        self._add("ReLU", f"{name}/relu", [blob], [blob])
        return blob

    def pooling(self, bottom: str, name: str, method: str, kernel: int, *, stride: int = 1, pad: int = 0) -> str:
        """Add a pooling of ``method`` MAX or AVE."""
        fields = f"pool: {method} kernel_size: {kernel} stride: {stride} pad: {pad}"
        return self.layer("Pooling", name, [bottom], f"pooling_param {{ {fields} }}")

    def global_average(self, bottom: str, name: str) -> str:
        return self.layer("Pooling", name, [bottom], "pooling_param { pool: AVE global_pooling: true }")

    def inner_product(self, bottom: str, name: str, inputs: int, outputs: int, *, scale: float = 1.0) -> str:
        """Add a fully connected layer of ``inputs`` numbers an image."""
        blobs = [self._he((outputs, inputs), inputs, scale), self._normal((outputs,), 0.1 * scale)]
        fields = f"inner_product_param {{ num_output: {outputs} }}"
        return self.layer("InnerProduct", name, [bottom], fields, channels=outputs, weights=blobs)

    def add(self, bottoms: Sequence[str], name: str) -> str:
        """Add an Eltwise layer that sums blobs of one shape."""
        return self.layer("Eltwise", name, bottoms, "eltwise_param { operation: SUM }")

    def concat(self, bottoms: Sequence[str], name: str) -> str:
        """Add a Concat layer along the channels."""
        return self.layer("Concat", name, bottoms, channels=sum(self._channels[bottom] for bottom in bottoms))

    def softmax(self, bottom: str, name: str = "prob") -> str:
        return self.layer("Softmax", name, [bottom])

    def _add(self, kind: str, name: str, bottoms: Sequence[str], tops: Sequence[str], parameters: str = "") -> None:
        blobs = [f'bottom: "{bottom}"' for bottom in bottoms] + [f'top: "{top}"' for top in tops]
        fields = " ".join([f'name: "{name}" type: "{kind}"', *blobs, *([parameters] if parameters else [])])
        self._lines.append(f"layer {{ {fields} }}")

    def _he(self, shape: tuple[int, ...], inputs: int, scale: float) -> Array:
        """Draw weights for an input from a ReLU, so that its scale is kept: https://arxiv.org/abs/1502.01852."""
        return self._normal(shape, scale * float(np.sqrt(2 / inputs)))

    def _normal(self, shape: tuple[int, ...], deviation: float) -> Array:
        return self._random.normal(0, deviation, shape).astype(np.float32)

    def _uniform(self, shape: tuple[int, ...]) -> Array:
        return self._random.uniform(0.8, 1.2, shape).astype(np.float32)
