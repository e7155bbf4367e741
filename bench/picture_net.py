"""A classifier as the peers and the bare loop run it: decode with OpenCV, resize, subtract the mean, onnxruntime."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import orjson
from numpy.typing import NDArray

from bench.answer import Answer

_VARIABLE = "BENCH_NET"


@dataclass(frozen=True)
class PictureNetFile:
    """A converted net with one input (n, channels, height, width), and how pictures become its input."""

    model: str
    """The path of the ONNX file."""
    mean: str
    """The path of a .npy file: what is subtracted from the pixels, (3, height, width) or (3, 1, 1), BGR."""

    def environment(self) -> dict[str, str]:
        """Return the environment that tells a server's processes of this net."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @staticmethod
    def from_environment() -> PictureNetFile:
        return PictureNetFile(**json.loads(os.environ[_VARIABLE]))


class PictureNet:
    """A loaded net. Safe in several threads."""

    def __init__(self, file: PictureNetFile, threads: int = 1) -> None:
        """``threads``: onnxruntime's in each run."""
        # The servers' processes and threads are the parallelism.
        cv2.setNumThreads(1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            Path(file.model).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        (tensor,) = self._session.get_inputs()
        self._input = tensor.name
        _, _, self._height, self._width = tensor.shape
        self._mean = np.load(file.mean)

    def planes(self, picture: bytes) -> NDArray[np.float32]:
        """Return the net's input for one encoded picture, (channels, height, width)."""
        pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        resized = cv2.resize(pixels, (self._width, self._height), interpolation=cv2.INTER_LINEAR)
        planes: NDArray[np.float32] = np.subtract(resized.transpose(2, 0, 1), self._mean, dtype=np.float32)
        return planes

    def scores(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores of a batch (n, channels, height, width), one row a picture."""
        (scores,) = self._session.run(None, {self._input: batch})
        return np.asarray(scores, np.float32).reshape(len(batch), -1)

    def answer(self, picture: bytes) -> Answer:
        """Return the best class of one picture."""
        (row,) = self.scores(self.planes(picture)[None])
        return Answer(int(row.argmax()), float(row.max()))

    def answers(self, pictures: list[bytes]) -> list[bytes]:
        """Return the best class of each picture as JSON, from one run of the net."""
        rows = self.scores(np.stack([self.planes(picture) for picture in pictures]))
        return [
            orjson.dumps({"index": index, "score": float(row[index])}) for row in rows for index in [int(row.argmax())]
        ]
