"""`atserving up`: the mesh in the foreground."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

import click

from atserving.cli.mesh import Mesh
from atserving.errors import StartError
from atserving.local import examples
from atserving.local.examples import Example

_HELP = """\
The mesh serves {apps} at {url}. Try, in another terminal:

  curl -s {url}/v1/eval/digits -H 'content-type: application/octet-stream' --data-binary @examples/digits/images/7.png
  curl -s {url}/v1/eval/digits/v2 -H 'content-type: application/json' \\
      -d '{{"data": {{"uri": "{files}/digits/images/3.png"}}, "params": {{"limit": 3}}}}'
  curl -s {url}/v1/batch -H 'content-type: application/json' -d '[
      {{"op": "/v1/eval/digits-detect", "data": {{"uri": "{files}/detect/images/1.png"}}}},
      {{"op": "/v1/eval/nothing", "data": {{}}}}]'
  {atserving} release list --registry {registry}
  {atserving} release phase digits v2 production --registry {registry}

Logs: {directory}/*.log. What dies is started again. Ctrl-C stops it all."""


@click.command(help="Run the mesh in the foreground: etcd, registry, gate, evaluators of the examples and Envoy.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="The edge's port; 0: any free one."
)
def up(port: int) -> None:
    run_until_stopped(_up(port))


def starting(serves: Sequence[Example]) -> str:
    """What is said before a mesh starts."""
    return f"Starting etcd, registry, gate, {len(serves)} evaluators and Envoy ..."


async def _up(port: int) -> None:
    print(starting(examples.ALL), flush=True)
    async with Mesh(port, examples.ALL) as mesh:
        print(
            _HELP.format(
                apps=", ".join(dict.fromkeys(each.app for each in mesh.serves)),
                url=mesh.url,
                files=mesh.files_url,
                registry=mesh.registry,
                directory=mesh.directory,
                atserving=".venv/bin/atserving",
            ),
            flush=True,
        )
        await mesh.wait_supervisor()
        raise StartError("supervisord ended by itself")


def run_until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Runs ``work``; the first SIGINT, SIGTERM or SIGHUP cancels it, and the rest are ignored while it cleans up."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(work)
        stopped = False

        def stop() -> None:
            nonlocal stopped
            if not stopped:
                stopped = True
                print("\nstopping", flush=True)
                task.cancel()

        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(name, stop)
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
