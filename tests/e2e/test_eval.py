"""`atserving eval` calls a net with images, and prints each answer."""

from __future__ import annotations

import asyncio
import os
import pty
import re
from collections.abc import AsyncIterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from atserving.cli import drawing
from atserving.local import examples
from atserving.local.mesh import Mesh
from atserving.uris import decode_data
from tests.e2e.client import IMAGES, image
from tests.e2e.eval_command import ONE, SEVEN, evaluate, line_of, objects, response, rows, server

pytestmark = pytest.mark.asyncio(loop_scope="session")

DETECT = examples.FOLDER / "detect" / "images" / "3.png"
SEGMENT = examples.FOLDER / "segment" / "images" / "2.png"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mesh() -> AsyncIterator[Mesh]:
    """Run a mesh of every example."""
    async with Mesh(serves=examples.ALL) as mesh:
        yield mesh


async def test_table_has_the_classes_of_each_image_in_order(mesh: Mesh) -> None:
    names = ["7.png", "1.png", "5.jpg", "3.png", "2.png", "9.png"]
    table = rows(await evaluate(mesh, "digits", *(str(IMAGES / name) for name in names), "-p", "limit=2"))
    assert table[0] == ["FILE", "VERSION", "TIME", "RESULT"]
    heads, bests = table[1::3], table[2::3]
    assert [head[0] for head in heads] == [str(IMAGES / name) for name in names]
    assert {(head[1], *head[3:]) for head in heads} == {("v1", "ms", "index", "class", "score")}
    assert [best[:2] for best in bests] == [
        *(["7", "seven"], ["1", "one"], ["5", "five"], ["3", "three"], ["2", "two"], ["9", "nine"])
    ]
    assert bests[0][2] == "0.999995"
    assert len(table) == 1 + 3 * len(names)


async def test_json_has_an_object_for_each_image(mesh: Mesh) -> None:
    ended = await evaluate(mesh, "digits/v2", SEVEN, ONE, "-o", "json", "--params", '{"limit": 1}', "-p", "limit=3")
    found = objects(ended)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [(each["file"], each["version"], each["code"], each["message"]) for each in found] == [
        (SEVEN, "v2", 0, ""),
        (ONE, "v2", 0, ""),
    ]
    confidences = [each["result"]["confidences"] for each in found]
    assert [len(each) for each in confidences] == [3, 3]
    assert [each[0]["class"] for each in confidences] == ["seven", "one"]


async def test_params_may_be_in_a_file(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"limit": 4}')
    (found,) = objects(await evaluate(mesh, "digits", SEVEN, "-o", "json", "--params", f"@{tmp_path / 'params.json'}"))
    assert len(found["result"]["confidences"]) == 4


async def test_url_is_fetched_by_the_evaluator(mesh: Mesh) -> None:
    url = f"{mesh.files_url}/digits/images/3.png"
    (found,) = objects(await evaluate(mesh, "digits", url, "-o", "json"))
    assert (found["file"], found["result"]["confidences"][0]["class"]) == (url, "three")


@pytest.mark.parametrize("flags", [[], ["-p", "limit=1"]], ids=["as bytes", "as JSON"])
async def test_standard_input_may_be_an_image(mesh: Mesh, flags: list[str]) -> None:
    table = rows(await evaluate(mesh, "digits", "-", *flags, stdin=image("7.png")))
    assert (table[1][0], table[2][1]) == ("-", "seven")


async def test_named_pipe_may_be_an_image(mesh: Mesh, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    asked = asyncio.create_task(evaluate(mesh, "digits", str(pipe)))
    await asyncio.to_thread(pipe.write_bytes, image("7.png"))
    assert rows(await asked)[2][1] == "seven"


async def test_group_is_one_request(mesh: Mesh) -> None:
    images = [str(IMAGES / "5.png"), str(IMAGES / "5.jpg")]
    (found,) = objects(await evaluate(mesh, "digits-similar", *images, "--group", "-o", "json"))
    assert found["file"] == images
    assert found["result"]["similarity"] > 0.7
    ended = await evaluate(mesh, "digits-similar", *images, "--group")
    assert re.search(r'v1 +\S+ ms +\{\n +"similarity": 0\.\d+\n +\}\n$', ended.stdout)


def pixels(path: Path) -> NDArray[np.uint8]:
    decoded = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded.astype(np.uint8)


async def test_boxes_are_listed_and_drawn(mesh: Mesh, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    table = rows(await evaluate(mesh, "digits-detect", str(DETECT), "--draw", str(drawn)))
    assert table[1][-4:] == ["index", "class", "score", "box"]
    assert table[2] == ["6", "five", "0.997939", "88,14", "132,78"]
    assert [row[1] for row in table[2:]] == ["five", "nine", "five"]
    canvas = pixels(drawn)
    scale = canvas.shape[0] // pixels(DETECT).shape[0]
    for index, _, _, left_top, right_bottom in table[2:]:
        (left, top), (right, bottom) = (
            [int(part) * scale for part in corner.split(",")] for corner in (left_top, right_bottom)
        )
        assert (canvas[bottom, left:right] == drawing.color_of(int(index))).all()
        assert (canvas[top : bottom + 1, right] == drawing.color_of(int(index))).mean() > 0.8


async def test_image_from_standard_input_is_drawn_on(mesh: Mesh, tmp_path: Path) -> None:
    drawn = [tmp_path / "file.png", tmp_path / "stdin.png"]
    await evaluate(mesh, "digits-detect", str(DETECT), "--draw", str(drawn[0]))
    await evaluate(mesh, "digits-detect", "-", "--draw", str(drawn[1]), stdin=DETECT.read_bytes())
    assert (pixels(drawn[0]) == pixels(drawn[1])).all()


async def test_regions_are_listed_and_the_mask_is_drawn(mesh: Mesh, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.png"
    table = rows(await evaluate(mesh, "digits-segment", str(SEGMENT), "--draw", str(drawn)))
    assert table[1][-3:] == ["mask:", "200x200", "pixels"]
    assert table[2] == ["index", "class", "score", "color", "box", "outline"]
    assert [row[1] for row in table[3:]] == ["four", "two", "six"]
    (found,) = objects(await evaluate(mesh, "digits-segment", str(SEGMENT), "-o", "json"))
    mask = cv2.imdecode(np.frombuffer(decode_data(found["result"]["mask"]), np.uint8), cv2.IMREAD_COLOR)
    assert mask is not None
    canvas, original = pixels(drawn), pixels(SEGMENT)
    scale = canvas.shape[0] // original.shape[0]
    enlarged = cv2.resize(original, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    changed = (canvas != enlarged).any(axis=2)
    labelled = mask.any(axis=2).repeat(scale, 0).repeat(scale, 1)
    assert changed[labelled].mean() > 0.95
    assert changed[~labelled].mean() < 0.1


async def test_stream_is_shown_encoded_or_saved(mesh: Mesh, tmp_path: Path) -> None:
    (_, row) = rows(await evaluate(mesh, "digits-feature", SEVEN))
    assert " ".join(row[4:]).startswith("a stream of 40 bytes, 10 as float32: 1.53561e-12 ")
    (found,) = objects(await evaluate(mesh, "digits-feature", SEVEN, "-o", "json"))
    stream = decode_data(found["result"])
    assert np.frombuffer(stream, "<f4").argmax() == 7
    saved = tmp_path / "features"
    ended = await evaluate(mesh, "digits-feature", SEVEN, "--output", str(saved))
    assert f"saved to {saved}" in ended.stdout
    assert saved.read_bytes() == stream
    (found,) = objects(await evaluate(mesh, "digits-feature", SEVEN, "-o", "json", "--output", str(saved)))
    assert ("result" in found, found["output"]) == (False, str(saved))


async def test_requests_run_at_a_time_and_are_printed_in_order() -> None:
    second = asyncio.Event()

    async def answer(number: int) -> bytes:
        if number == 0:
            await second.wait()
        elif number == 1:
            second.set()
        return response(200, b'{"code":0,"message":"","result":%d}' % number)

    async with server(answer) as url:
        found = objects(await evaluate(url, "digits", SEVEN, ONE, "-o", "json"))
    assert {each["result"] for each in found} == {0, 1}
    assert [each["file"] for each in found] == [SEVEN, ONE]


# Terminals


@pytest.mark.parametrize(("variables", "styled"), [({}, True), ({"NO_COLOR": "1"}, False)])
async def test_terminal_gets_styles_unless_no_color_is_set(mesh: Mesh, variables: dict[str, str], styled: bool) -> None:
    command, environment = line_of(mesh.url, "digits", SEVEN)
    ours, theirs = pty.openpty()
    environment |= {"TERM": "xterm"} | variables
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=theirs)
    os.close(theirs)

    def read() -> bytes:
        output = b""
        try:
            while part := os.read(ours, 4096):
                output += part
        except OSError:  # the terminal's other side is closed
            return output
        return output

    output = await asyncio.to_thread(read)
    os.close(ours)
    assert await process.wait() == 0
    assert b"seven" in output
    assert (b"\x1b" in output) == styled


async def test_file_gets_no_styles_and_unbroken_lines(mesh: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    (folder / "7.png").write_bytes(image("7.png"))
    ended = await evaluate(mesh, "digits", str(folder / "7.png"), FORCE_COLOR="1", COLUMNS="40", TERM="xterm")
    assert rows(ended)[1][0] == str(folder / "7.png")
    assert "\x1b" not in ended.stdout
