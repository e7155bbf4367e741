"""``classify``: the classes of an image, the most likely first.

Params: ``limit``, how many classes (1); all of them if it is larger. Result: ``{"confidences": [{"index", "class",
"score"}, ...]}``, best first; ``class`` is the index as text if ``labels.csv`` has no name for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atserving.errors import InvalidArgument, StartError
from evaluator.images.decoding import Pixels
from evaluator.net_config import NetConfig
from evaluator.net_contract import Req, Ret
from evaluator.nets import image_input
from evaluator.nets.image_input import ImageNet


@dataclass(frozen=True)
class Input:
    """A prepared request. ``pixels`` is (height, width, channels) uint8."""

    pixels: Pixels
    limit: int


class Classify(ImageNet):
    """A classifier: a net with one score per class."""

    name = "classify"

    def __init__(self, config: NetConfig) -> None:
        """Raises StartError if the release can't be served as a classifier."""
        super().__init__(config)
        self._output = self.output("classes")
        shape = self.net.output_shape(self._output)
        # One score per class, with or without the axes of a global pooling.
        if not shape or any(size not in (1, None) for size in shape[1:]):
            raise StartError(f"classify takes nets that give one score a class; {self._output!r} is {shape}")

    def preprocess(self, req: Req) -> Input:
        limit = image_input.params(req).get("limit", 1)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InvalidArgument("params.limit should be a positive integer")
        pixels, _ = self.image(req)
        return Input(pixels, limit)

    def infer(self, reqid: str, reqs: Sequence[Input]) -> list[Ret]:
        scores = self.net.run({self.net.inputs[0]: np.stack([req.pixels for req in reqs])}, [self._output])[
            self._output
        ]
        # (n, k), or (n, k, 1, 1) after a global pooling.
        if scores.shape[0] != len(reqs) or scores.size != len(reqs) * scores.shape[1]:
            return [{"code": 500, "message": f"the net's output is {scores.shape}, not one score a class"}] * len(reqs)
        rows = scores.reshape(len(reqs), -1)
        return [self._ret(row, req.limit) for row, req in zip(rows, reqs, strict=True)]

    def _ret(self, scores: np.ndarray[Any, np.dtype[np.float32]], limit: int) -> Ret:
        if not np.isfinite(scores).all():
            return {"code": 500, "message": "the net's output is not finite"}
        # A stable sort lists equal scores in the order of their index.
        best = [int(scores.argmax())] if limit == 1 else np.argsort(-scores, kind="stable")[:limit].tolist()
        confidences = [
            {"index": index, "class": self.class_name(index), "score": float(scores[index])} for index in best
        ]
        return {"code": 0, "message": "", "result": {"confidences": confidences}}
