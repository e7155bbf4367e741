"""`atserving demo` and `atserving up`, the commands that a newcomer runs first, work and report what is wrong."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import aiohttp
import cv2
import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from atserving.cli import drawing
from atserving.cli.demo import ask, play
from atserving.cli.scenes import Drawing, Scene
from atserving.errors import StartError
from atserving.local import commands, examples
from atserving.local.child import bound_to_parent
from atserving.local.mesh import Mesh
from tests.e2e.client import image

pytestmark = pytest.mark.asyncio(loop_scope="session")

DETECT = examples.FOLDER / "detect" / "images" / "3.png"
SEGMENT = examples.FOLDER / "segment" / "images"


def picture(path: Path, flags: int = cv2.IMREAD_COLOR) -> NDArray[np.uint8]:
    decoded = cv2.imread(str(path), flags)
    assert decoded is not None, path
    return decoded.astype(np.uint8)


async def started(*arguments: str) -> asyncio.subprocess.Process:
    """Start `atserving` with its output piped."""
    command = bound_to_parent([str(commands.BIN / "atserving"), *arguments])
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)


def scenes_of(output: str) -> dict[str, str]:
    """Return the demo's output for each request line, from the status on."""
    return dict(re.findall(r"^\$ (.+?)\n(HTTP .+?)\n\n", output, re.MULTILINE | re.DOTALL))


def body_of(output: str, *parts: str) -> str:
    """Return the response to the only request line with those parts, without its status."""
    [response] = [each for line, each in scenes_of(output).items() if all(part in line for part in parts)]
    return response.partition("\n")[2]


async def test_the_demo_plays_every_example_and_draws_the_results(tmp_path: Path) -> None:
    demo = await started("demo", "--out", str(tmp_path))
    output = (await demo.communicate())[0].decode()
    assert demo.returncode == 0, output
    for example in examples.ALL:
        assert f"/v1/eval/{example.app} " in output or f"/v1/eval/{example.app}/{example.version} " in output
    assert f"Drawn: {tmp_path}/detect.png, {tmp_path}/segment.png." in output
    assert "0.99999535" in body_of(output, "/digits-feature ", "| od")
    assert body_of(output, "/digits-feature ", "| wc") == "256"
    assert body_of(output, "/digits-similar ", "| wc") == "512"
    similar = [each for line, each in scenes_of(output).items() if "/digits-similar " in line and "| wc" not in line]
    assert orjson.loads(similar[0].partition("\n")[2])["result"]["similarity"] > 0.7

    found = orjson.loads(body_of(output, "/digits-detect ").partition("\n")[0])["result"]["detections"]
    assert {each["class"] for each in found} == {"five", "nine"}
    check_boxes(picture(tmp_path / "detect.png"), picture(DETECT), found)
    check_mask(picture(tmp_path / "segment.png"))


def check_boxes(drawn: NDArray[np.uint8], original: NDArray[np.uint8], found: list[dict[str, Any]]) -> None:
    scale = drawn.shape[0] // original.shape[0]
    for each in found:
        (left, _), _, (right, bottom), _ = (np.array(each["pts"]) * scale).tolist()
        assert (drawn[bottom, left:right] == drawing.color_of(each["index"])).all()


def check_mask(drawn: NDArray[np.uint8]) -> None:
    """Check that the picture changed on the pixels that are labelled as digits, and hardly elsewhere."""
    original, truth = picture(SEGMENT / "2.png"), picture(SEGMENT / "2.mask.png", cv2.IMREAD_GRAYSCALE)
    scale = drawn.shape[0] // original.shape[0]
    enlarged = cv2.resize(original, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    changed = (drawn != enlarged).any(axis=2)
    digits = cv2.resize(truth, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) > 0
    assert changed[digits].mean() > 0.9
    assert changed[~digits].mean() < 0.1


async def test_an_unexpected_status_stops_the_demo(mesh: Mesh, tmp_path: Path) -> None:
    line = f"curl {mesh.url}/v1/eval/cats -H 'content-type: application/octet-stream' -d x"
    assert await play(Scene("Fine", line, 404), tmp_path) is None
    with pytest.raises(StartError, match="'Wrong' was answered with HTTP 404, not 200"):
        await play(Scene("Wrong", line), tmp_path)


async def test_a_result_with_nothing_to_draw_stops_the_demo(mesh: Mesh, tmp_path: Path) -> None:
    seven = "examples/digits/images/7.png"
    line = f"curl {mesh.url}/v1/eval/digits -H 'content-type: application/octet-stream' --data-binary @{seven}"
    with pytest.raises(StartError, match="'No boxes' has no detections"):
        await play(Scene("No boxes", line, drawing=Drawing(seven, "x.png")), tmp_path)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("line", ["curl http://127.0.0.1:1/", "curl http://127.0.0.1:1/ | wc -c"])
async def test_a_failing_curl_stops_the_demo(line: str) -> None:
    with pytest.raises(StartError, match="exit status 7"):
        ask(line)


async def test_up_serves_the_examples_until_it_is_interrupted() -> None:
    up = await started("up", "--port", "0", "--gates", "2")
    assert up.stdout
    output = (await up.stdout.readuntil(b"Ctrl-C")).decode()
    serves = re.search(r"^The mesh serves (.+) at (http://\S+)\. ", output, re.MULTILINE)
    assert serves, output
    assert serves[1].split(", ") == list(dict.fromkeys(example.app for example in examples.ALL))
    headers = {"content-type": "application/octet-stream"}
    async with aiohttp.ClientSession() as session:
        url = f"{serves[2]}/v1/eval/digits-feature"
        async with session.post(url, data=image("7.png"), headers=headers) as response:
            assert (response.status, len(await response.read())) == (200, 40)
    logs = re.search(r"^Logs: (\S+)/\*\.log", output, re.MULTILINE)
    assert logs
    assert {"gate.log", "gate-1.log"} <= set(os.listdir(logs[1]))
    # The command of the docs, which keeps its data out of the checkout.
    (documented,) = re.findall(
        r"\$ (prometheus --config\.file .+)", (examples.ROOT / "docs" / "monitoring.md").read_text()
    )
    assert re.sub(r"/tmp/atserving-\w+", logs[1], documented, count=1) in output
    up.send_signal(signal.SIGINT)
    assert b"stopping" in await up.stdout.read()
    assert await up.wait() == 0
