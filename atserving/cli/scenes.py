"""The scenes of the demo: each is one request as a curl command line, with its expected status."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

JSON = "-H 'content-type: application/json'"
BYTES = "-H 'content-type: application/octet-stream'"


@dataclass(frozen=True)
class Drawing:
    """A picture to make of a scene's result."""

    image: str
    """The image to draw on, as a path in the checkout."""
    file: str
    """The name of the picture's file."""


@dataclass(frozen=True)
class Scene:
    """One request of the demo: a shell command line and the expected HTTP status."""

    title: str
    line: str
    status: int = 200
    drawing: Drawing | None = None


def scenes(url: str, files: str) -> Iterator[Scene]:
    """Yield every row of the HTTP API and every example.

    Run the lines in the checkout. ``url`` is the edge's URL, ``files`` the URL of the examples' file server.
    """
    yield Scene("Is the edge up?", f"curl {url}/health")
    yield from _digits(url, files)
    yield from _other_nets(url)
    yield from _streams(url, files)
    digit = "--data-binary @examples/digits/images/1.png"
    yield Scene("An app that does not exist", f"curl {url}/v1/eval/cats {BYTES} {digit}", 404)
    yield Scene("A body that is not an image", f"curl {url}/v1/eval/digits {BYTES} -d 'not an image'", 400)


def _digits(url: str, files: str) -> Iterator[Scene]:
    images = "examples/digits/images"
    by_url = f"{files}/digits/images"
    yield Scene(
        "An image as a data URI, in JSON",
        f"""curl {url}/v1/eval/digits {JSON} -d '{{"data": {{"uri": """
        f""""data:application/octet-stream;base64,'$(base64 -w0 {images}/7.png)'"}}}}'""",
    )
    best_3 = f"""-d '{{"data": {{"uri": "{by_url}/3.png"}}, "params": {{"limit": 3}}}}'"""
    yield Scene("An image by its URL, with a parameter", f"curl {url}/v1/eval/digits {JSON} {best_3}")
    yield Scene(
        "The same on the version in staging, which answers only when it is named",
        f"curl {url}/v1/eval/digits/v2 {JSON} {best_3}",
    )
    yield Scene("An image as raw bytes", f"curl {url}/v1/eval/digits {BYTES} --data-binary @{images}/5.jpg")
    yield Scene("The same with a version", f"curl {url}/v1/eval/digits/v2 {BYTES} --data-binary @{images}/5.jpg")
    yield Scene(
        "A group, several images for one answer: classify takes only one",
        f"""curl {url}/v1/eval/digits {JSON} """
        f"""-d '{{"data": [{{"uri": "{by_url}/1.png"}}, {{"uri": "{by_url}/2.png"}}]}}'""",
        400,
    )
    yield Scene(
        "A batch of independent tasks, of which two fail",
        f"""curl {url}/v1/batch {JSON} -d '[
    {{"op": "/v1/eval/digits", "data": {{"uri": "{by_url}/8.png"}}}},
    {{"op": "/v1/eval/digits", "data": {{"uri": "{by_url}/nothing.png"}}}},
    {{"op": "/v1/eval/digits/v9", "data": {{"uri": "{by_url}/8.png"}}}},
    {{"op": "/v1/eval/digits/v2", "data": {{"uri": "{by_url}/9.png"}}}}]'""",
    )


def _other_nets(url: str) -> Iterator[Scene]:
    image = "examples/detect/images/3.png"
    yield Scene(
        "Find objects on an image: the built-in net detect",
        f"curl {url}/v1/eval/digits-detect {BYTES} --data-binary @{image}",
        drawing=Drawing(image, "detect.png"),
    )
    image = "examples/segment/images/2.png"
    yield Scene(
        "Label each pixel: the built-in net segment (long values are cut here)",
        f"curl {url}/v1/eval/digits-segment {BYTES} --data-binary @{image}",
        drawing=Drawing(image, "segment.png"),
    )


def _streams(url: str, files: str) -> Iterator[Scene]:
    seven = f"{files}/digits/images/7.png"
    yield Scene(
        "The features of an image, as little-endian float32: the built-in net feature",
        f"curl {url}/v1/eval/digits-feature {BYTES} --data-binary @examples/digits/images/7.png | od -A d -t f4 -w40",
    )
    yield Scene(
        "The features of an inner layer: how many bytes?",
        f"""curl {url}/v1/eval/digits-feature {JSON} """
        f"""-d '{{"data": {{"uri": "{seven}"}}, "params": {{"layer": "ip1"}}}}' | wc -c""",
    )
    fives = f'"data": [{{"uri": "{files}/digits/images/5.png"}}, {{"uri": "{files}/digits/images/5.jpg"}}]'
    yield Scene(
        "A group, two images for one answer: a custom net, written in net.py",
        f"curl {url}/v1/eval/digits-similar {JSON} -d '{{{fives}}}'",
    )
    yield Scene(
        "The same as a stream, which a parameter of this net.py selects: how many bytes?",
        f"""curl {url}/v1/eval/digits-similar {JSON} -d '{{{fives}, "params": {{"format": "stream"}}}}' | wc -c""",
    )
