"""Serves releases with evaluator processes, and sends requests to them over real gRPC."""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from atserving.v1.evaluator_pb2 import InferRequest, InferResponse
from atserving.v1.serving_pb2 import Resource
from gate.connection import EvaluatorConnection
from tests.evaluator.built_in import Array, png
from tests.evaluator.calling import ask, connected
from tests.processes import Process, Registry, evaluator

Box = Sequence[float]


class RunningRelease:
    """A release on a running evaluator."""

    def __init__(self, connection: EvaluatorConnection) -> None:
        self._connection = connection

    async def ask(self, body: bytes, params: str = "{}") -> InferResponse:
        return await ask(self._connection, InferRequest(data=[Resource(body=body)], params_json=params))

    async def result(self, body: bytes, **params: Any) -> dict[str, Any]:
        response = await self.ask(body, orjson.dumps(params).decode())
        assert response.WhichOneof("outcome") == "result_json", response
        result: dict[str, Any] = orjson.loads(response.result_json)
        return result

    async def stream(self, body: bytes, **params: Any) -> Array:
        response = await self.ask(body, orjson.dumps(params).decode())
        assert response.WhichOneof("outcome") == "stream", response
        return np.frombuffer(response.stream, "<f4")


@contextmanager
def serving(registry: Registry, app: str, tar: Path, **custom_values: Any) -> Iterator[Process]:
    """Run an evaluator of a release's tar."""
    registry.publish(app, file=f"file://{tar}", custom_values=custom_values)
    with evaluator(registry, app) as process:
        yield process


@asynccontextmanager
async def connected_release(process: Process) -> AsyncIterator[RunningRelease]:
    """Connect to the release of a running evaluator."""
    async with connected(process) as connection:
        yield RunningRelease(connection)


def write_tar(path: Path, members: Mapping[str, Path]) -> Path:
    """Write a release's tar of these files, by name."""
    with tarfile.open(path, "w") as tar:
        for name, member in members.items():
            tar.add(member, name)
    return path


def overlap(one: Box, other: Box) -> float:
    """Return the intersection over the union of two boxes."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def boxes(result: dict[str, Any], size: tuple[int, int]) -> list[Box]:
    """Return the boxes of a result, and assert its form. ``size`` is the image's width and height."""
    scores = [each["score"] for each in result["detections"]]
    assert scores == sorted(scores, reverse=True)
    found: list[Box] = []
    for each in result["detections"]:
        (left, top), _, (right, bottom), _ = each["pts"]
        assert each["pts"] == [[left, top], [right, top], [right, bottom], [left, bottom]]
        assert 0 <= left <= right < size[0]
        assert 0 <= top <= bottom < size[1]
        assert 0 <= each["score"] <= 1
        found.append((left, top, right, bottom))
    return found


async def check_refusals(release: RunningRelease, image: bytes, bad_params: dict[str, Sequence[str]]) -> None:
    """Assert that bad images and bad params give code 400, and that the next request gets its result."""
    bomb = io.BytesIO(png(np.zeros((1, 1, 3))))
    bomb.seek(16)
    bomb.write(b"\x00\x01\x86\xa0" * 2)
    for body in (b"\x00", b"no image", image[: len(image) // 2], image[:2] + image, b"<svg/>", bomb.getvalue()):
        response = await release.ask(body)
        assert (response.error.code, response.error.refused) == (400, False), body[:20]
        assert "image" in response.error.message
    for name, values in bad_params.items():
        for value in values:
            response = await release.ask(image, f'{{"{name}": {value}}}')
            assert response.error.code == 400, value
            said = (f"params.{name} should be", "params is not JSON", "params has a number beyond")
            assert any(each in response.error.message for each in said), value
    for params in ("[]", "5", '"x"', "{", "[" * 100_000):
        assert (await release.ask(image, params)).error.code == 400
    assert (await release.ask(image)).WhichOneof("outcome") != "error"


BAD_LIMITS = ("0", "-1", "1.0", "true", "null", '"1"', "[1]", "NaN", "1e400", "-1e30")
BAD_LAYERS = ('"data"', '"conv1"', '""', "null", "5", "true", '["prob"]', "{}")
BAD_THRESHOLDS = ("-0.1", "1.01", "true", "null", '"0.5"', "[]", "NaN", "Infinity", "1e400", "1" * 400)


def odd_images() -> list[Array]:
    noise = np.random.default_rng(1).integers(0, 255, (200, 300, 3))
    return [np.zeros((1, 1, 3)), np.full((1, 4000, 3), 255), np.full((4000, 1, 3), 90), noise]
