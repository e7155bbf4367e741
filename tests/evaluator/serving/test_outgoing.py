"""A whole evaluator fetches through its proxy, and from the hosts of its settings, which change while it runs."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from atserving.local import commands
from atserving.v1.serving_pb2 import Resource
from tests.evaluator.calling import infer
from tests.evaluator.digits import DIGITS
from tests.evaluator.fetching.http_proxy import http_proxy
from tests.processes import Evaluator, Registry, evaluator
from tests.waiting import until_async

pytestmark = pytest.mark.slow

CREDENTIALS = "me:marked-secret"


@asynccontextmanager
async def host() -> AsyncIterator[int]:
    """Yield the port of a host with the example's files."""
    app = web.Application()
    app.router.add_static("/", DIGITS)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@asynccontextmanager
async def running(registry: Registry, app: str, *flags: str) -> AsyncIterator[Evaluator]:
    """Run an evaluator whose host and proxy run on this event loop."""
    context = evaluator(registry, app, "v1", *flags)
    process = await asyncio.to_thread(context.__enter__)
    try:
        yield process
    finally:
        context.__exit__(None, None, None)


async def status(process: Evaluator, uri: str) -> int:
    """Return the status of a request with a resource; 200 for a result."""
    answer = await infer(process, Resource(uri=uri))
    return answer.error.status or (200 if '"seven"' in answer.result_json else 0)


async def test_release_and_resources_come_through_the_proxy(registry: Registry, tmp_path: Path) -> None:
    auth = tmp_path / "auth"
    auth.write_text(CREDENTIALS)
    digest = hashlib.sha256((DIGITS / "digits-v1.tar").read_bytes()).hexdigest()
    async with host() as port, http_proxy({"files.test": "127.0.0.1"}, CREDENTIALS) as proxy:
        registry.publish("proxied", file=f"http://files.test:{port}/digits-v1.tar#sha256={digest}")
        flags = ("--proxy", proxy.url, "--proxy-auth", str(auth), "--log-level", "debug")
        async with running(registry, "proxied", *flags) as process:
            assert await status(process, f"http://files.test:{port}/images/7.png") == 200
            assert await status(process, f"http://127.0.0.1:{port}/images/7.png") == 400
            assert await status(process, f"http://unknown.test:{port}/images/7.png") == 502
            shown = await asyncio.to_thread(
                subprocess.check_output, ["ps", "-ww", "-o", "args=", "-p", str(process.pid)]
            )
            process.terminate()
            assert await asyncio.to_thread(process.wait) == 0
    assert [asked.partition(f":{port}")[2] for asked in proxy.asked] == [
        "/digits-v1.tar",
        "/images/7.png",
        "/images/7.png",
    ]
    assert b"--proxy-auth" in shown
    for output in (shown.decode(), *process.lines):
        assert "marked-secret" not in output


async def test_settings_of_an_app_narrow_its_hosts_without_a_restart(registry: Registry) -> None:
    registry.publish("narrow")
    key = "worker/app/narrow/default"
    async with host() as port, running(registry, "narrow", "--allow-network", "127.0.0.0/8") as process:
        uri = f"http://127.0.0.1:{port}/images/7.png"

        async def becomes(settings: dict[str, object], expected: int) -> None:
            registry.put(key, settings)

            async def is_so() -> bool:
                return await status(process, uri) == expected

            await until_async(is_so)

        assert await status(process, uri) == 200
        await becomes({"fetch_deny": ["127.0.0.0/24"]}, 400)
        await becomes({"fetch_allow": ["127.0.0.0/8"]}, 200)
        await becomes({"fetch_allow": ["*.example"]}, 400)
        try:
            # Nobody lifts what is denied to all apps.
            registry.put("worker/default", {"fetch_deny": ["127.0.0.1"]})
            await becomes({"max_concurrent": 9}, 400)
        finally:
            registry.delete("worker/default")
        await becomes({}, 200)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--proxy", "http://me:marked-secret@proxy:3128"], "should have no credentials"),
        (["--proxy", "socks5://proxy:1"], "should be http://host:port"),
        (["--no-proxy", "a.example"], "--proxy-auth and --no-proxy go with --proxy"),
        (["--proxy", "http://proxy:1", "--no-proxy", "10.0.0.1/8"], "10.0.0.1/8 has host bits set"),
    ],
)
def test_wrong_flag_is_one_line_without_secrets(flags: list[str], message: str) -> None:
    command = commands.evaluator("127.0.0.1:1", "a", "v1", *flags)
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, message in ended.stderr, ended.stderr.count("\n")) == (2, True, 1)
    assert "marked-secret" not in ended.stderr
