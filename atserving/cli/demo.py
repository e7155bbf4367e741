"""`atserving demo`: play the HTTP API and every example app with curl, on a mesh of its own."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import orjson

from atserving.cli import drawing, results
from atserving.cli.scenes import Drawing, Scene, scenes
from atserving.cli.up import starting, tell
from atserving.errors import StartError
from atserving.local import examples
from atserving.local.examples import ROOT
from atserving.local.foreground import run_until_stopped
from atserving.local.mesh import Mesh


@click.command(help="Start the mesh, play the HTTP API and the examples with curl, and stop the mesh.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="The folder for the pictures that the demo draws.",
)
def demo(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot make the folder {out} for the pictures: {error.strerror}") from None
    run_until_stopped(_demo(out))


async def _demo(out: Path) -> None:
    for tool in ("bash", "curl", "base64", "od", "wc"):
        if not shutil.which(tool):
            raise StartError(f"the demo needs {tool}, which is not installed")
    began = time.monotonic()
    tell(starting(examples.ALL))
    async with Mesh(serves=examples.ALL, tell=tell) as mesh:
        print(f"Ready after {time.monotonic() - began:.1f} s.\n")
        drawn = [path for scene in scenes(mesh.url, mesh.files_url) if (path := await play(scene, out))]
    print(f"Drawn: {', '.join(map(str, drawn))}.")
    print(f"Stopped. The demo took {time.monotonic() - began:.1f} s.")


async def play(scene: Scene, out: Path) -> Path | None:
    """Run a scene and print it. Return the picture that was drawn from its result, if it has one.

    Raises StartError if the response has another status than the scene, or nothing to draw.
    """
    print(f"# {scene.title}\n$ {scene.line}")
    status, version, body = await asyncio.to_thread(ask, scene.line)
    heading = f"HTTP {status}" + (f", x-serving-version: {version}" if version else "")
    print(f"{heading}\n{shortened(body)}", flush=True)
    if status != scene.status:
        raise StartError(f"{scene.title!r} was answered with HTTP {status}, not {scene.status}")
    path = _draw(scene.title, scene.drawing, orjson.loads(body)["result"], out) if scene.drawing else None
    print(f"-> {path}\n" if path else "")
    return path


def _draw(title: str, target: Drawing, result: dict[str, Any], out: Path) -> Path:
    if not result.get("detections"):
        raise StartError(f"{title!r} has no detections to draw")
    path = out / target.file
    path.write_bytes(drawing.draw((ROOT / target.image).read_bytes(), result))
    return path


def ask(line: str) -> tuple[int, str, str]:
    """Run a line of curl in the checkout. Return the HTTP status, the version that answered, and the line's output."""
    with tempfile.NamedTemporaryFile() as headers:
        quiet = f"curl --silent --show-error --dump-header {headers.name} "
        shell = ["bash", "-o", "pipefail", "-c", line.replace("curl ", quiet, 1)]
        run = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace", check=False)
        if run.returncode:
            raise StartError(f"curl failed with exit status {run.returncode}")
        text = headers.read().decode()
    # An interim response, 100 Continue, comes before the final one.
    status = re.findall(r"^HTTP/\S+ (\d+)", text, re.MULTILINE)[-1]
    version = re.search(r"^x-serving-version: (\S+)", text, re.MULTILINE)
    return int(status), version[1] if version else "", run.stdout.rstrip("\n")


def shortened(body: str) -> str:
    """Return the body, with long texts and lists cut if it is JSON: their beginnings, and how long they are."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    short = results.cut(value)
    return body if short == value else orjson.dumps(short).decode()
