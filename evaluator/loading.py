"""From a release's files to a net that answers: its script where it has one, a built-in net otherwise."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import cv2

from evaluator import nets
from evaluator.contract import Config
from evaluator.release import SCRIPT
from evaluator.runner import NetRunner, Runner
from evaluator.script.runner import ScriptRunner


async def load(cfg: Config, stack: ExitStack) -> NetRunner:
    """The net of ``cfg``, loaded but not yet warm. Raises StartError.

    What runs beside this process ends with ``stack``: one that won't start too, once the call is cancelled.
    """
    # The decoding threads are the parallelism; OpenCV's own would only compete with them.
    cv2.setNumThreads(1)
    if SCRIPT not in cfg["tar_files"]:
        functions = nets.built_in(cfg["custom_values"].get("net", nets.DEFAULT))
        return await asyncio.to_thread(Runner, functions, cfg)
    script = ScriptRunner(cfg)
    stack.callback(script.close)
    await asyncio.to_thread(script.start)
    return script
