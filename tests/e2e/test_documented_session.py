"""The commands of docs/promote-and-roll-back.md, played on a mesh: they print what the page says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator

import aiohttp
import pytest

from atserving.local import commands, examples
from atserving.local.examples import FOLDER, ROOT
from atserving.local.mesh import Mesh
from tests.processes import Evaluator
from tests.waiting import PATIENCE_S, until_async

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "promote-and-roll-back.md"


def session() -> Iterator[tuple[str, list[str]]]:
    """Yield each command of the page, and the lines that it prints; the start of an evaluator prints none."""
    command, printed = "", list[str]()
    for line in [*PAGE.read_text().splitlines(), ""]:
        text = line.strip()
        is_code = line.startswith("    ")
        if command and (not is_code or text.startswith("$ ")):
            yield command, printed
            command = ""
        if is_code and (text.startswith("$ ") or "-m evaluator" in text):
            command, printed = text.removeprefix("$ "), []
        elif is_code and command:
            printed.append(text)


def meant(printed: str) -> object:
    """Return what a command says: words, or of an answer the class."""
    if printed.startswith("{"):
        return [each["class"] for each in json.loads(printed)["result"]["confidences"]]
    if "VERDICT" in printed:
        # Times differ, and so does what follows from them.
        printed = re.sub(r"[\d.e+]+ ms|, [\d.]+ times as long", "", printed)
        return [re.sub(r"^(\S+ +\S+ +\d+ +\d+ +\d+ +)\d+", r"\1", line).split() for line in printed.splitlines()]
    return printed.split()


async def play(mesh: Mesh, command: str) -> str:
    """Run a command of the page, with paths and addresses of this mesh; return its output."""
    for written, real in (
        ("file:///path/to/digits.tar", (FOLDER / "digits" / "digits-v2.tar").as_uri()),
        ("localhost:8080", mesh.url.removeprefix("http://")),
        ("@7.png", f"@{FOLDER / 'digits' / 'images' / '7.png'}"),
    ):
        command = command.replace(written, real)
    environment = {**os.environ, "PATH": f"{commands.BIN}:{os.environ['PATH']}", "ATSERVING_SERVER": mesh.registry}
    run = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=PATIENCE_S
    )
    assert run.returncode == 0, f"{command}: {run.stderr}"
    return str(run.stdout)


async def same_for_programs(mesh: Mesh, command: str) -> None:
    """Check that a comparison is the same in JSON, from the command and over REST."""
    (printed,) = json.loads(await play(mesh, f"{command} -o json"))["comparisons"]
    url = f"http://127.0.0.1:{mesh.ports.operators}/v1/apps/digits/comparisons?version=v3"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        (answered,) = (await response.json())["comparisons"]
    assert printed == answered
    assert (answered["baseline"], answered["equal"]) == ("v1", "40")
    assert answered["verdict"].startswith("the same answers")


async def test_the_page_tells_what_happens() -> None:
    steps = list(session())
    verbs = [re.findall(r"^\w+ release (\w+)|^\w+ app (\w+)|(curl|-m evaluator)", command)[0] for command, _ in steps]
    assert ["".join(verb) for verb in verbs] == [
        *("put", "-m evaluator", "curl", "shadow", "curl", "compare", "shadow"),
        *("split", "promote", "rollback", "demote", "delete"),
    ]
    async with Mesh(serves=examples.DIGITS) as mesh:
        instance = Evaluator(mesh.registry, "digits", "v3")
        try:
            for command, printed in steps:
                if "-m evaluator" in command:
                    instance.start()
                    await asyncio.to_thread(instance.wait_serving)
                    continue
                if " delete " in command:
                    instance.terminate()
                    assert await instance.ended() == 0
                if command.startswith("curl"):
                    # The gate hears of the instance a moment after it is registered.
                    async def answers(command: str = command) -> bool:
                        return bool(json.loads(await play(mesh, command))["code"] == 0)

                    await until_async(answers)
                if " compare " in command:
                    # The gates tell the registry once a second.
                    async def compared(command: str = command) -> bool:
                        return " 40 " in await play(mesh, command)

                    await until_async(compared)
                    await same_for_programs(mesh, command)
                output = await play(mesh, command)
                assert meant(output) == meant("\n".join(printed)), command
        finally:
            instance.kill()
