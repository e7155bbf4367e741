"""`atserving demo`: the whole HTTP API, played with curl on a mesh of its own."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import click

from atserving.cli.mesh import DIGITS, ROOT, Mesh
from atserving.cli.up import run_until_stopped
from atserving.errors import StartError

JSON = "-H 'content-type: application/json'"
BYTES = "-H 'content-type: application/octet-stream'"


@dataclass(frozen=True)
class Scene:
    """One request of the demo, as a line of shell, and the HTTP status it is to have."""

    title: str
    line: str
    status: int = 200


def scenes(url: str, files: str, images: str) -> Iterator[Scene]:
    """Every row of the HTTP API. ``images`` is a folder, relative to where the lines are run; ``files`` its URL."""
    yield Scene("Is the edge up?", f"curl {url}/health")
    yield Scene(
        "An image as a data URI, in JSON",
        f"""curl {url}/v1/eval/digits {JSON} -d '{{"data": {{"uri": """
        f""""data:application/octet-stream;base64,'$(base64 -w0 {images}/7.png)'"}}}}'""",
    )
    best_3 = f"""-d '{{"data": {{"uri": "{files}/3.png"}}, "params": {{"limit": 3}}}}'"""
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
        f"""-d '{{"data": [{{"uri": "{files}/1.png"}}, {{"uri": "{files}/2.png"}}]}}'""",
        400,
    )
    yield Scene(
        "A batch of independent tasks, of which two fail",
        f"""curl {url}/v1/batch {JSON} -d '[
    {{"op": "/v1/eval/digits", "data": {{"uri": "{files}/8.png"}}}},
    {{"op": "/v1/eval/digits", "data": {{"uri": "{files}/nothing.png"}}}},
    {{"op": "/v1/eval/digits/v9", "data": {{"uri": "{files}/8.png"}}}},
    {{"op": "/v1/eval/digits/v2", "data": {{"uri": "{files}/9.png"}}}}]'""",
    )
    yield Scene("An app that does not exist", f"curl {url}/v1/eval/cats {BYTES} --data-binary @{images}/1.png", 404)
    yield Scene("A body that is no image", f"curl {url}/v1/eval/digits {BYTES} -d 'not an image'", 400)


@click.command(help="Start the mesh, play the HTTP API with curl, and stop it again.")
def demo() -> None:
    run_until_stopped(_demo())


async def _demo() -> None:
    for tool in ("bash", "curl", "base64"):
        if not shutil.which(tool):
            raise StartError(f"the demo needs {tool}, which is not installed")
    began = time.monotonic()
    print("Starting etcd, registry, gate, two evaluators and Envoy ...", flush=True)
    async with Mesh() as mesh:
        print(f"Ready after {time.monotonic() - began:.1f} s.\n")
        for scene in scenes(mesh.url, mesh.files_url, str((DIGITS / "images").relative_to(ROOT))):
            await _play(scene)
    print(f"Stopped. The demo took {time.monotonic() - began:.1f} s.")


async def _play(scene: Scene) -> None:
    print(f"# {scene.title}\n$ {scene.line}")
    status, version, body = await asyncio.to_thread(ask, scene.line)
    print(f"HTTP {status}" + (f", x-serving-version: {version}" if version else "") + f"\n{body}\n", flush=True)
    if status != scene.status:
        raise StartError(f"{scene.title!r} was answered with HTTP {status}, not {scene.status}")


def ask(line: str) -> tuple[int, str, str]:
    """Runs a line of curl as it is shown; returns the HTTP status, the version that answered, and the body."""
    with tempfile.NamedTemporaryFile() as headers:
        quiet = f"curl --silent --show-error --dump-header {headers.name} --write-out '\\n%{{http_code}}' "
        shell = ["bash", "-c", line.replace("curl ", quiet, 1)]
        run = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace", check=False)
        if run.returncode:
            raise StartError(f"curl failed with exit status {run.returncode}")
        version = re.search(r"^x-serving-version: (\S+)", headers.read().decode(), re.MULTILINE)
    body, _, status = run.stdout.rpartition("\n")
    return int(status), version[1] if version else "", body
