"""`atserving eval` says by one line and its exit status what went wrong."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from atserving.cli import service
from atserving.cli.eval import evaluate as command
from atserving.local.mesh import Mesh
from tests.e2e.client import image, padded
from tests.e2e.eval_command import ONE, SEVEN, evaluate, failed, objects, response, server
from tests.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

DEAD = "http://127.0.0.1:1"


async def test_one_failed_request_leaves_the_others(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    broken = str(tmp_path / "broken.png")
    ended = await evaluate(mesh, "digits", SEVEN, broken, ONE, "-o", "json")
    first, second, third = objects(ended)
    assert [each["code"] for each in (first, second, third)] == [0, 400, 0]
    assert "result" not in second
    assert failed(ended, 1) == f"atserving: {broken}: {second['message']} (code 400, x-reqid {second['reqid']})"
    assert "the image can't be decoded" in second["message"]
    assert f"{broken}" in (await evaluate(mesh, "digits", SEVEN, broken)).stdout
    await until(lambda: second["reqid"] in mesh.log("gate"), what="the gate has logged the request's id")


@pytest.mark.parametrize(
    ("net", "message"),
    [("cats", "unknown app 'cats'"), ("digits/v9", "app 'digits' has no version 'v9'")],
)
async def test_unknown_app_or_version_is_status_3(mesh: Mesh, net: str, message: str) -> None:
    line = failed(await evaluate(mesh, net, SEVEN, ONE), 3)
    assert re.fullmatch(rf"atserving: {SEVEN}: {message} \(code 404, x-reqid [0-9a-f]+\)", line)


async def test_404_of_a_net_is_status_1() -> None:
    async def answer(number: int) -> bytes:
        return response(404, b'{"code":404,"message":"no face"}', b"x-serving-version: v1")

    async with server(answer) as url:
        assert "no face" in failed(await evaluate(url, "digits", SEVEN), 1)


async def test_unreachable_edge_is_one_line_and_status_7() -> None:
    ended = await evaluate(DEAD, "digits", SEVEN, ONE)
    assert failed(ended, 7).startswith(f"atserving: the edge {DEAD} cannot be reached: ")
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "the connection to the edge broke"),
        (response(200, b"<html>"), "HTTP 200 without an answer of a mesh"),
        (response(404, b"[1]"), "HTTP 404 without an answer of a mesh"),
        (response(502, b'{"code":0,"message":""}'), "HTTP 502 without an answer of a mesh"),
        (response(302, b"", b"location: http://127.0.0.1:1/"), "HTTP 302 without an answer of a mesh"),
        (response(503, b'{"code":503,"message":"\\u001b[2J"}'), r"\x1b[2J (code 503"),
    ],
)
async def test_odd_answer_is_one_line_and_status_1(sent: bytes, message: str) -> None:
    async def answer(number: int) -> bytes:
        return sent

    async with server(answer) as url:
        ended = await evaluate(url, "digits", SEVEN, "-o", "json")
    assert message in failed(ended, 1)
    (found,) = objects(ended)
    assert found["code"] == (503 if "503" in message else None)


async def test_timeout_is_one_line_and_status_1() -> None:
    async def answer(number: int) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with server(answer) as url:
        assert "no answer within 1.5 s (x-reqid " in failed(await evaluate(url, "digits", SEVEN, "--timeout", "1.5"), 1)


async def test_answer_without_boxes_is_not_drawn(mesh: Mesh, tmp_path: Path) -> None:
    ended = await evaluate(mesh, "digits", SEVEN, "--draw", str(tmp_path / "x.png"))
    assert "no boxes and no mask to draw" in failed(ended, 1)
    assert "seven" in ended.stdout
    assert "no stream" in failed(await evaluate(mesh, "digits", SEVEN, "--output", str(tmp_path / "x")), 1)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", SEVEN, "no-such.png"], "no-such.png: No such file or directory"),
        (["digits", SEVEN, "."], ".: Is a directory"),
        (["digits", "LARGE"], "larger than the 20 MiB that the edge takes ("),
        (["digits", "HALF", "HALF", "--group"], "larger than the 20 MiB that the edge takes, as base64 in JSON ("),
        (["digits", "LESS", "-p", "limit=1"], "larger than the 20 MiB that the edge takes, as base64 in JSON ("),
        (["digits", "-", "-"], "- may be given once"),
        (["digits"], "Missing argument 'FILE|URL...'"),
        (["a/b/c", SEVEN], "'a/b/c' is not APP or APP/VERSION"),
        (["digits", SEVEN, "--edge", "localhost:8080"], "'localhost:8080' is not a URL"),
        (["digits", SEVEN, "--edge", "http://[::1"], "'http://[::1' is not a URL"),
        (["digits", SEVEN, "--params", "{"], "not JSON"),
        (["digits", SEVEN, "--params", "NaN"], "not JSON"),
        (["digits", SEVEN, "--params", "@no-such.json"], "no-such.json: No such file or directory"),
        (["digits", SEVEN, "--attribute", "{"], "not JSON"),
        (["digits", SEVEN, "--params", "[1]", "-p", "a=1"], "-p needs --params to be a JSON object"),
        (["digits", SEVEN, "-p", "limit"], "'limit' is not NAME=VALUE"),
        (["digits", SEVEN, ONE, "--draw", "x.png"], "--draw and --output take one image"),
        (["digits", SEVEN, ONE, "--group", "--draw", "x.png"], "--draw takes one image"),
        (["digits", "http://127.0.0.1/x.png", "--draw", "x.png"], "--draw takes one image from a file"),
        (["digits", SEVEN, "--draw", "x.jpg"], "x.jpg should end in .png"),
    ],
)
async def test_wrong_flag_or_file_is_status_2_before_anything_is_sent(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, size in (("LARGE", (20 << 20) + 1), ("LESS", 16 << 20), ("HALF", 8 << 20)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["atserving", *arguments])
    # This process has a running loop already, so an attempt to send would be another error.
    with pytest.raises(SystemExit) as stop:
        service.run(command, "atserving")
    output = capsys.readouterr()
    assert (stop.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    assert message in output.err


async def test_too_much_on_standard_input_is_refused() -> None:
    ended = await evaluate(DEAD, "digits", "-", stdin=bytes((20 << 20) + 1))
    assert "-: larger than the 20 MiB" in failed(ended, 2)


async def test_image_of_the_largest_size_is_sent(mesh: Mesh, tmp_path: Path) -> None:
    """The net refuses it, not the command."""
    large = tmp_path / "large.png"
    large.write_bytes(padded(image("7.png"), 20 << 20)[: 20 << 20])
    assert "larger than 10485760 bytes (code 400" in failed(await evaluate(mesh, "digits", str(large)), 1)
