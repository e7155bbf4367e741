"""Run work in the foreground of a terminal until it ends or a signal stops it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from atserving.telemetry import configure_logging


def run_until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``. The first SIGINT, SIGTERM or SIGHUP cancels it; later ones are ignored while it cleans up."""
    configure_logging("atserving", "warning")

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
