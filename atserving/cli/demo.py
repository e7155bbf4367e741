"""`atserving demo`: the whole HTTP API and every example app, played with curl on a mesh of its own."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import orjson

from atserving.cli import drawing
from atserving.cli.mesh import Mesh
from atserving.cli.up import run_until_stopped, starting
from atserving.errors import StartError
from atserving.local import examples
from atserving.local.examples import ROOT

JSON = "-H 'content-type: application/json'"
BYTES = "-H 'content-type: application/octet-stream'"

_LONGEST_TEXT = 100
_LONGEST_LIST = 8
_SHOWN = 3  # of a list that is longer


@dataclass(frozen=True)
class Drawing:
    """What a scene's answer is drawn on, as a path in the checkout, how, and into which file."""

    image: str
    draw: Callable[[bytes, dict[str, Any]], bytes]
    file: str


@dataclass(frozen=True)
class Scene:
    """One request of the demo, as a line of shell, and the HTTP status it is to have."""

    title: str
    line: str
    status: int = 200
    drawing: Drawing | None = None


def scenes(url: str, files: str) -> Iterator[Scene]:
    """Every row of the HTTP API and every example. The lines are run in the checkout; ``files`` serves its examples."""
    yield Scene("Is the edge up?", f"curl {url}/health")
    yield from _digits(url, files)
    yield from _other_nets(url)
    yield from _streams(url, files)
    digit = "--data-binary @examples/digits/images/1.png"
    yield Scene("An app that does not exist", f"curl {url}/v1/eval/cats {BYTES} {digit}", 404)
    yield Scene("A body that is no image", f"curl {url}/v1/eval/digits {BYTES} -d 'not an image'", 400)


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
        "The same on the version in staging, which only answers by name",
        f"curl {url}/v1/eval/digits/v2 {JSON} {best_3}",
    )
    yield Scene("An image as it is", f"curl {url}/v1/eval/digits {BYTES} --data-binary @{images}/5.jpg")
    yield Scene("The same, versioned", f"curl {url}/v1/eval/digits/v2 {BYTES} --data-binary @{images}/5.jpg")
    yield Scene(
        "A group, several images for one answer: classify takes one",
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
        "Where things are on an image: the built-in net detect",
        f"curl {url}/v1/eval/digits-detect {BYTES} --data-binary @{image}",
        drawing=Drawing(image, drawing.boxes, "detect.png"),
    )
    image = "examples/segment/images/2.png"
    yield Scene(
        "Which pixels are what: the built-in net segment (what is long is cut here)",
        f"curl {url}/v1/eval/digits-segment {BYTES} --data-binary @{image}",
        drawing=Drawing(image, drawing.mask, "segment.png"),
    )


def _streams(url: str, files: str) -> Iterator[Scene]:
    seven = f"{files}/digits/images/7.png"
    yield Scene(
        "What a net makes of an image, as little-endian float32: the built-in net feature",
        f"curl {url}/v1/eval/digits-feature {BYTES} --data-binary @examples/digits/images/7.png | od -A d -t f4 -w40",
    )
    yield Scene(
        "The same of an inner layer: how many bytes?",
        f"""curl {url}/v1/eval/digits-feature {JSON} """
        f"""-d '{{"data": {{"uri": "{seven}"}}, "params": {{"layer": "ip1"}}}}' | wc -c""",
    )
    fives = f'"data": [{{"uri": "{files}/digits/images/5.png"}}, {{"uri": "{files}/digits/images/5.jpg"}}]'
    yield Scene(
        "A group, two images for one answer: a net of its own, by a net.py",
        f"curl {url}/v1/eval/digits-similar {JSON} -d '{{{fives}}}'",
    )
    yield Scene(
        "The same as a stream, if the net.py is asked for it: how many bytes?",
        f"""curl {url}/v1/eval/digits-similar {JSON} -d '{{{fives}, "params": {{"format": "stream"}}}}' | wc -c""",
    )


@click.command(help="Start the mesh, play the HTTP API and the examples with curl, and stop it again.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="The folder of the pictures that are drawn.",
)
def demo(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"the pictures can't be drawn into {out}: {error.strerror}") from None
    run_until_stopped(_demo(out))


async def _demo(out: Path) -> None:
    for tool in ("bash", "curl", "base64", "od", "wc"):
        if not shutil.which(tool):
            raise StartError(f"the demo needs {tool}, which is not installed")
    began = time.monotonic()
    print(starting(examples.ALL), flush=True)
    async with Mesh(serves=examples.ALL) as mesh:
        print(f"Ready after {time.monotonic() - began:.1f} s.\n")
        drawn = [path for scene in scenes(mesh.url, mesh.files_url) if (path := await play(scene, out))]
    print(f"Drawn: {', '.join(map(str, drawn))}.")
    print(f"Stopped. The demo took {time.monotonic() - began:.1f} s.")


async def play(scene: Scene, out: Path) -> Path | None:
    """Runs a scene and prints it; the picture that its answer was drawn into.

    Raises StartError where it is answered with another status than the scene has, or with nothing to draw.
    """
    print(f"# {scene.title}\n$ {scene.line}")
    status, version, body = await asyncio.to_thread(ask, scene.line)
    print(
        f"HTTP {status}" + (f", x-serving-version: {version}" if version else "") + f"\n{shortened(body)}", flush=True
    )
    if status != scene.status:
        raise StartError(f"{scene.title!r} was answered with HTTP {status}, not {scene.status}")
    path = _draw(scene.title, scene.drawing, orjson.loads(body)["result"], out) if scene.drawing else None
    print(f"-> {path}\n" if path else "")
    return path


def _draw(title: str, what: Drawing, result: dict[str, Any], out: Path) -> Path:
    if not result.get("detections"):
        raise StartError(f"{title!r} has no detections to draw")
    path = out / what.file
    path.write_bytes(what.draw((ROOT / what.image).read_bytes(), result))
    return path


def ask(line: str) -> tuple[int, str, str]:
    """Runs a line of curl as it is shown; the HTTP status, the version that answered, and what the line wrote."""
    with tempfile.NamedTemporaryFile() as headers:
        quiet = f"curl --silent --show-error --dump-header {headers.name} "
        shell = ["bash", "-o", "pipefail", "-c", line.replace("curl ", quiet, 1)]
        run = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace", check=False)
        if run.returncode:
            raise StartError(f"curl failed with exit status {run.returncode}")
        said = headers.read().decode()
    # An interim response, 100 Continue, comes before the one that counts.
    status = re.findall(r"^HTTP/\S+ (\d+)", said, re.MULTILINE)[-1]
    version = re.search(r"^x-serving-version: (\S+)", said, re.MULTILINE)
    return int(status), version[1] if version else "", run.stdout.rstrip("\n")


def shortened(body: str) -> str:
    """The body as it is; where it is JSON with long texts or lists in it, their beginnings and how long they are."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    short = _cut(value)
    return body if short == value else orjson.dumps(short).decode()


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(each) for name, each in value.items()}
    if isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            return [*map(_cut, value[:_SHOWN]), f"... {len(value) - _SHOWN} more"]
        return [_cut(each) for each in value]
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[: _LONGEST_TEXT // 2]}... {len(value)} characters"
    return value
